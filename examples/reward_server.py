"""A reward server in twenty lines: `python examples/reward_server.py`, then `reward_funcs: http://127.0.0.1:8090/score`.

The protocol is in docs/rewards.md. Replace `reward` by your own; it may read anything in `item`.
"""

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reward(item: dict) -> float:
    completion = item["completion"]  # text, or messages if the prompts are conversations
    return -abs(len(completion if isinstance(completion, str) else completion[-1]["content"]) - 100)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        token = os.environ.get("BONDLM_REWARD_TOKEN")
        if token and self.headers["Authorization"] != f"Bearer {token}":
            return self.send_error(401)
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        body = json.dumps({"rewards": [{"id": item["id"], "reward": reward(item)} for item in items]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8090), Handler).serve_forever()
