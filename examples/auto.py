"""Lets the model decide whether a prompt calls for an image, a text, or both.

python examples/auto.py
"""

from mdm_hf import MDMPipeline


pipe = MDMPipeline.from_pretrained("model_cards/mdm-digits")
three = pipe(text="a handwritten three", generate="auto", seed=0)[0]["images"][0]
three.resize((256, 256), 0).save("three.png")
print("Wrote three.png.")
print(pipe(text="which digit is this?", images=three, generate="auto", seed=0)[0]["text"][0])
