"""Reading a W&B run's own data store (`run-ID.wandb`): a log in LevelDB's format of protobuf records."""

import json
import struct
import time
import zlib

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """The records of the file, as protobuf messages, up to the first that is not all there."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, []  # the file begins with an identifier of 7 bytes
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's end too short for a header is padding
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        position += HEADER + length
        part = data[position - length : position]
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return  # W&B is still writing it
        parts.append(part)
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts.clear()
            yield record


def finished_records(folder, patience=30.0):
    """All records of the only offline run below a folder, waiting some seconds for W&B's own process to finish it.

    That process may still be writing when `wandb.finish` returns. The last record is the one of kind `exit`.
    """
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + patience
    while True:
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{path} has no end after {patience} seconds")
        time.sleep(0.05)


def read_run(folder, patience=30.0):
    """(rows of history as dictionaries, configuration) of the only, finished offline run below a folder."""
    history, config = [], {}
    for record in finished_records(folder, patience):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(_values(record.history.item))
        elif kind == "config":
            config.update(_values(record.config.update))
        elif kind == "run":
            config.update(_values(record.run.config.update))
    return history, config


def _values(items):
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def artifact_files(folder, kind):
    """Names of the files in the artifacts of a type that the only offline run below a folder has logged."""
    found = finished_records(folder)
    requests = [r.request.log_artifact.artifact for r in found if r.WhichOneof("record_type") == "request"]
    artifacts = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"] + requests
    return {entry.path for artifact in artifacts if artifact.type == kind for entry in artifact.manifest.contents}
