"""Reading a W&B run's own data store (`run-ID.wandb`): a log in LevelDB's format of protobuf records."""

import json
import struct
import time

BLOCK = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """Every record of the file, as protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, []  # the file begins with an identifier of 7 bytes
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:  # a block's end too short for a header is padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts.clear()
            yield record


def read_run(folder):
    """(rows of history as dictionaries, configuration) of the only, finished offline run below a folder."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(100):  # W&B's own process may still be writing when `finish` returns
        history, config, finished = _read(path)
        if finished:
            return history, config
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def _read(path):
    history, config, finished = [], {}, False
    for record in records(path):
        kind = record.WhichOneof("record_type")
        finished |= kind == "exit"
        if kind == "history":
            history.append(_values(record.history.item))
        elif kind == "config":
            config.update(_values(record.config.update))
        elif kind == "run":
            config.update(_values(record.run.config.update))
    return history, config, finished


def _values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def artifact_files(folder, kind):
    """Names of the files in the artifacts of a type that the only offline run below a folder has logged."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    requests = [r.request.log_artifact.artifact for r in records(path) if r.WhichOneof("record_type") == "request"]
    artifacts = [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"] + requests
    return {entry.path for artifact in artifacts if artifact.type == kind for entry in artifact.manifest.contents}
