"""A model as a Gradio Space; MDM_MODEL, a variable in its settings, says which: a Hub repository or a folder."""

import os

from mdm_hf import MDMPipeline
from mdm_hf.publishing.space import build, launch


MODEL = os.environ.get("MDM_MODEL", "org/mdm-digits")

if __name__ == "__main__":
    launch(build(MDMPipeline.from_pretrained(MODEL)))
