"""From a folder to the Hub, from there to another folder, and from that to an endpoint that a client asks: all on this
machine, by the commands that a user types. Run by test_publishing.py, or alone:

    python modeling_tests/hub_round_trip.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import InferenceClient, ModelCard
from loopback_endpoint import LoopbackEndpoint
from loopback_hub import WRITE_TOKEN, LoopbackHub
from PIL import Image, ImageChops

from mdm_hf.publishing.examples import enlarged


CARD = Path(__file__).parents[1] / "model_cards" / "mdm-digits"
REPO = "org/mdm-digits"


def mdm(*arguments: str, hub: LoopbackHub, home: Path) -> str:
    """What the command prints; its errors end this."""
    environment = os.environ | hub.environment(home, WRITE_TOKEN)
    command = [sys.executable, "-m", "mdm_hf.cli", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"mdm {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def round_trip(place: Path) -> dict:
    """What happened, with `place` for all that is written."""
    with LoopbackHub() as hub:
        commit = mdm("push", str(CARD), REPO, "--private", hub=hub, home=place / "home").strip()
        asked = [line for line in hub.requests if line.startswith("POST /api/")]
        listed = mdm("pull", REPO, str(place / "pulled"), "--dry-run", hub=hub, home=place / "other")
        mdm("pull", REPO, str(place / "pulled"), hub=hub, home=place / "other")
    pulled = place / "pulled"
    card = ModelCard.load(pulled / "README.md")
    widget = card.data.to_dict()["widget"]
    with LoopbackEndpoint(pulled) as endpoint:
        client = InferenceClient(model=endpoint.url)
        drawn = client.text_to_image(widget[0]["text"], seed=0)
        said = client.image_to_text(str(pulled / widget[1]["src"])).generated_text
        question = {"image": str(pulled / widget[2]["src"]), "question": widget[2]["text"]}
        answers = [one.answer for one in client.visual_question_answering(**question)]
    with Image.open(pulled / widget[0]["output"]["url"]) as shown:
        same = ImageChops.difference(enlarged(drawn.convert("RGB")), shown.convert("RGB")).getbbox() is None
    return {
        "commit": commit,
        "card validated before anything was made": asked.index("POST /api/validate-yaml")
        < asked.index("POST /api/repos/create"),
        "files listed": listed.count("\n") - 1,
        "files pulled": sum(
            path.is_file() for path in pulled.rglob("*") if not {".cache", "__pycache__"} & set(path.parts)
        ),
        "scores in the card": len(card.data.eval_results),
        "the picture that the endpoint draws is the widget's": same,
        "caption of the widget's picture": said,
        "answers about it": answers,
        "the widget's own answer": widget[2]["output"]["text"],
    }


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(json.dumps(round_trip(Path(folder)), indent=1))
