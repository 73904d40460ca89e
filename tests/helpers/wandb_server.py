"""A W&B server on this machine that notes what the real client asks of it."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VIEWER = {"id": "user", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}


@contextlib.contextmanager
def wandb_server():
    """(environment that leads the client here, list that fills with the reports it saves)."""
    saved = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql":
                self.send_error(404)
                return
            asked = json.loads(body)
            query, given = asked["query"], asked.get("variables") or {}
            if "upsertView" in query:
                saved.append(given)
                project = {"id": "project", "name": given["projectName"], "entityName": given["entityName"]}
                shown = {name: given[name] for name in ("type", "name", "displayName", "description", "spec")}
                view = {**shown, "id": "VmlldzoxMg==", "project": project, "updatedAt": None}
                data = {"upsertView": {"view": view, "inserted": True}}
            elif "viewer" in query:
                data = {"viewer": VIEWER}
            elif "internalId" in query:
                data = {"project": {"internalId": "UHJvamVjdA=="}}
            elif "models" in query:
                data = {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
            else:
                data = {"upsertModel": {"model": {"id": "project", "name": "project"}, "inserted": True}}
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0123456789" * 4}, saved
    finally:
        server.shutdown()
        server.server_close()
