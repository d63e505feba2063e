"""An Inference Endpoint on this machine, for tests of `handler.py` over real HTTP.

    with LoopbackEndpoint(folder) as endpoint:
        InferenceClient(model=endpoint.url).text_to_image("a three")

Follows the contract of the Hub's own server: the body of `image/*` is decoded to a picture, that of JSON to a dict,
which needs `inputs`; `Accept: image/*` sends a picture back, anything else JSON, pictures in it as base64; whatever
the handler raises is status 400 with the message under "error".
"""

import base64
import importlib.util
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image


class LoopbackEndpoint:
    """Serves the folder's own handler.py until the `with` block ends."""

    def __init__(self, folder: Path):
        spec = importlib.util.spec_from_file_location("endpoint_handler", folder / "handler.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        handler = module.EndpointHandler(str(folder))

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                try:
                    reply, kind = answer(
                        handler, body, self.headers.get("Content-Type", ""), self.headers.get("Accept")
                    )
                    status = 200
                except Exception as error:
                    reply, kind, status = json.dumps({"error": str(error)}).encode(), "application/json", 400
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "LoopbackEndpoint":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()


def answer(handler, body: bytes, content_type: str, accept: str | None) -> tuple[bytes, str]:
    data = {"inputs": Image.open(io.BytesIO(body))} if content_type.startswith("image/") else json.loads(body)
    if "inputs" not in data:
        raise ValueError("Body needs to provide a inputs key")
    made = handler(data)
    if accept is not None and accept.startswith("image/"):
        return as_png(made), accept
    text = json.dumps(made, default=lambda one: base64.b64encode(as_png(one)).decode())
    return text.encode(), "application/json"


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
