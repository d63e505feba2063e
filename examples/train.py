"""Train on conversations of your own: here, digits with their captions.

python examples/train.py [--output-dir runs/example] [--max-steps 2000]

Any list or data set of {"messages": [...]} will do; the last assistant message holds what the model is to generate.
"""

import argparse

from transformers import TrainingArguments

from mdm_hf import MDMConfig, MDMForMultiModalGeneration, MDMPipeline, MDMProcessor
from mdm_hf.allocator import keep_freed_memory
from mdm_hf.training.digits import load_digits_split
from mdm_hf.training.trainer import ConversationCollator, EMACallback, MDMTrainer


parser = argparse.ArgumentParser()
parser.add_argument("--output-dir", default="runs/example")
parser.add_argument("--max-steps", type=int, default=2000)
options = parser.parse_args()

words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
conversations = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"a handwritten {words[label]}"}]},
            {"role": "assistant", "content": [{"type": "image", "image": image}]},
        ]
    }
    for image, label in zip(*load_digits_split("train"), strict=True)
]

keep_freed_memory()
processor = MDMProcessor.from_pretrained("model_cards/mdm-digits")
model = MDMForMultiModalGeneration(MDMConfig.from_preset("mdm-digits"))
ema = EMACallback(decay=0.99)
trainer = MDMTrainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    ),
    train_dataset=conversations,
    data_collator=ConversationCollator(processor),
    callbacks=[ema],
)
trainer.train()
ema.swap_in(model)
MDMPipeline(model.eval(), processor).save_pretrained(options.output_dir)
print(f"Wrote {options.output_dir}.")
