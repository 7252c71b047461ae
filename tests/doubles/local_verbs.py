"""`python -m tests.doubles.local_verbs up|down|status`: local mode's own verbs, with a double in the engine's place.

DOUBLE_STATE is what the double's supervisor says of itself; DOUBLE_GATEWAY=broken makes a gateway that cannot start.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from scripts.local import __main__ as verbs
from scripts.local import plan, settings, start
from scripts.local.supervisor import Plan

ENGINE = """
import http.server, json, os, subprocess, sys
key = open(os.environ["VLLM_API_KEY_FILE"]).read().strip()
double = subprocess.Popen([sys.executable, "-m", "tests.doubles.vllm_server", "--port", os.environ["VLLM_PORT"],
                           "--api-key=" + key, "--model", os.environ["MODEL_NAME"], "--pace-ms", "2", "--tokens", "40"])
class Status(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"state": os.environ.get("DOUBLE_STATE", "ready"), "reason": "as the test said"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["ENGINE_STATUS_PORT"])), Status).serve_forever()
"""
_whole = plan.whole


def whole(local: settings.LocalSettings, nginx: Path) -> Plan:
    """The plan with the doubles in their places."""
    kept = _whole(local, nginx)
    doubles = {"vllm": [sys.executable, "-c", ENGINE]}
    if os.environ.get("DOUBLE_GATEWAY") == "broken":
        doubles["gateway"] = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    services = [dataclasses.replace(one, argv=doubles.get(one.name, one.argv)) for one in kept.services]
    return dataclasses.replace(kept, services=services)


if __name__ == "__main__":
    plan.whole = whole
    start.engine_parts = lambda settings: None
    sys.exit(verbs.main(sys.argv[1:]))
