"""One row of each data set that an adapter reads, written by us in the field layout that its source has."""

from PIL import Image

from mdm_hf.training.records import Record


PICTURE = Image.new("RGB", (8, 8), "red")

# Adapter, row, what of the record is not empty.
LAYOUTS = {
    "imagenet-hub": ("imagenet", {"image": PICTURE, "label": 726}, {"image": PICTURE, "class_id": 726}),
    "imagenet-webdataset": (
        "imagenet",
        {"__key__": "n01440764_10026", "__url__": "train-0.tar", "jpg": b"...", "cls": 0},
        {"image": b"...", "class_id": 0},
    ),
    "journeydb-line": (
        "journeydb",
        {
            "img_path": "./147/73fd6a40.jpg",
            "prompt": "a lighthouse at dusk, oil on canvas --ar 3:2 --v 4",
            "Task1": {"Prompt Inversion": "..."},
            "Task2": {"Caption": "A lighthouse stands over the sea."},
            "Task3": {"Content QA": [{"Question": "...", "Options": {"A": "..."}, "Answer": "A"}]},
        },
        {
            "image": "./147/73fd6a40.jpg",
            "captions": [
                "a lighthouse at dusk, oil on canvas --ar 3:2 --v 4",
                "A lighthouse stands over the sea.",
            ],
        },
    ),
    "journeydb-without-tasks": (
        "journeydb",
        {"img_path": "./000/0a.jpg", "prompt": "a fox", "Task2": None},
        {"image": "./000/0a.jpg", "captions": ["a fox"]},
    ),
    "ultrachat-200k": (
        "ultrachat",
        {
            "prompt": "How do tides work?",
            "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
            "messages": [
                {"content": "How do tides work?", "role": "user"},
                {"content": "The moon pulls.", "role": "assistant"},
            ],
        },
        {"messages": [("user", "How do tides work?"), ("assistant", "The moon pulls.")]},
    ),
    "ultrachat-original": (
        "ultrachat",
        {"id": "0", "data": ["Hello?", "Hello.", "What is an <image> tag?", "A mark."]},
        {
            "messages": [
                ("user", "Hello?"),
                ("assistant", "Hello."),
                ("user", "What is an <image> tag?"),
                ("assistant", "A mark."),
            ]
        },
    ),
    "coco-hub-2014": (
        "coco",
        {
            "image": PICTURE,
            "filepath": "COCO_train2014_000000057870.jpg",
            "sentids": [787980, 789366],
            "filename": "COCO_train2014_000000057870.jpg",
            "imgid": 40504,
            "split": "train",
            "sentences_tokens": [["a", "hotel"], ["a", "table"]],
            "sentences_raw": ["A hotel restaurant.", "A table set for two."],
            "sentences_sentid": [787980, 789366],
            "cocoid": 57870,
        },
        {"image": PICTURE, "captions": ["A hotel restaurant.", "A table set for two."]},
    ),
    "coco-karpathy": (
        "coco",
        {
            "filepath": "val2014",
            "filename": "COCO_val2014_000000184613.jpg",
            "sentences": ["A child holding an umbrella.", "A woman petting a yak."],
            "cocoid": 184613,
            "url": "http://images.cocodataset.org/val2014/COCO_val2014_000000184613.jpg",
        },
        {
            "image": "COCO_val2014_000000184613.jpg",
            "captions": ["A child holding an umbrella.", "A woman petting a yak."],
        },
    ),
    "coco-lmms": (
        "coco",
        {"question_id": "1.jpg", "image": PICTURE, "question": "Please caption.", "answer": ["One.", "Two."], "id": 1},
        {"image": PICTURE, "captions": ["One.", "Two."]},
    ),
    "coco-annotations": (
        "coco",
        {"image_id": 203564, "id": 37, "caption": "A bicycle replica with a clock.", "image": "000000203564.jpg"},
        {"image": "000000203564.jpg", "captions": ["A bicycle replica with a clock."]},
    ),
    "flickr30k-hub": (
        "flickr30k",
        {
            "image": PICTURE,
            "caption": ["Two men.", "Two friends.", " ", "Two youths.", "Two guys."],
            "sentids": ["0", "1", "2", "3", "4"],
            "split": "train",
            "img_id": "0",
            "filename": "1000092795.jpg",
        },
        {"image": PICTURE, "captions": ["Two men.", "Two friends.", "Two youths.", "Two guys."]},
    ),
    "flickr30k-karpathy": (
        "flickr30k",
        {
            "sentids": [0],
            "imgid": 0,
            "sentences": [{"tokens": ["two", "men"], "raw": "Two men.", "imgid": 0, "sentid": 0}],
            "split": "train",
            "filename": "1000092795.jpg",
        },
        {"image": "1000092795.jpg", "captions": ["Two men."]},
    ),
    "vqav2-hub": (
        "vqav2",
        {
            "question_type": "what is this",
            "multiple_choice_answer": "net",
            "answers": [
                {"answer": "net", "answer_confidence": "maybe", "answer_id": 1},
                {"answer": "net", "answer_confidence": "yes", "answer_id": 2},
                {"answer": "mesh", "answer_confidence": "maybe", "answer_id": 3},
            ],
            "image_id": 458752,
            "answer_type": "other",
            "question_id": 458752000,
            "question": "What is this photo taken looking through?",
            "image": PICTURE,
        },
        {"image": PICTURE, "questions": [("What is this photo taken looking through?", ["net", "net", "mesh"])]},
    ),
    "gqa-instructions": (
        "gqa",
        {
            "id": "02930152",
            "imageId": "n288870",
            "question": "Is the sky dark?",
            "answer": "yes",
            "fullAnswer": "Yes, the sky is dark.",
            "isBalanced": True,
            "groups": {"global": None, "local": "06-sky_dark"},
            "types": {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr"},
            "image": "n288870.jpg",
        },
        {"image": "n288870.jpg", "questions": [("Is the sky dark?", ["yes"])]},
    ),
    "ocrvqa-hub": (
        "ocrvqa",
        {
            "image": PICTURE,
            "image_id": "1449312997",
            "questions": ["Who wrote this book?", "Is this a travel guide?"],
            "answers": ["Sandra Boynton", "No"],
            "ocr_tokens": ["SANDRA"],
            "title": "Birthday Monsters!",
            "authorName": "Sandra Boynton",
            "genre": "Children's Books",
            "set_name": "train",
        },
        {
            "image": PICTURE,
            "questions": [("Who wrote this book?", ["Sandra Boynton"]), ("Is this a travel guide?", ["No"])],
        },
    ),
    "textvqa-hub": (
        "textvqa",
        {
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "question": "what brand is this camera?",
            "question_tokens": ["what", "brand"],
            "image": PICTURE,
            "image_width": 1024,
            "flickr_300k_url": "https://c4.staticflickr.com/1/3.jpg",
            "answers": ["nous les gosses", "dakota", "dakota digital"],
            "image_classes": ["Cassette deck"],
            "set_name": "val",
            "ocr_tokens": ["DAKOTA"],
        },
        {
            "image": PICTURE,
            "questions": [("what brand is this camera?", ["nous les gosses", "dakota", "dakota digital"])],
        },
    ),
    "visual-genome-questions": (
        "visual_genome",
        {
            "image": PICTURE,
            "image_id": 1,
            "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
            "width": 800,
            "qas": [
                {"qa_id": 986768, "image_id": 1, "question": "What color is the clock?", "answer": "Green."},
                {"qa_id": 986777, "image_id": 1, "question": "How tall is it?", "answer": "Very tall."},
            ],
        },
        {
            "image": PICTURE,
            "questions": [("What color is the clock?", ["Green."]), ("How tall is it?", ["Very tall."])],
        },
    ),
    "visual-genome-regions": (
        "visual_genome",
        {
            "image": PICTURE,
            "image_id": 1,
            "regions": [{"region_id": 1382, "image_id": 1, "phrase": "the clock is green", "x": 421, "y": 57}],
        },
        {"image": PICTURE, "captions": ["the clock is green"]},
    ),
    "llava-150k": (
        "llava",
        {
            "id": "000000033471",
            "image": "000000033471.jpg",
            "conversations": [
                {"from": "human", "value": "What are the colors of the bus?\n<image>"},
                {"from": "gpt", "value": "White and red."},
            ],
        },
        {
            "messages": [
                ("user", "What are the colors of the bus?", "000000033471.jpg"),
                ("assistant", "White and red."),
            ]
        },
    ),
    "llava-two-images": (
        "llava",
        {
            "id": "7",
            "image": ["a.jpg", "b.jpg"],
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nWhich is older?"},
                {"from": "gpt", "value": "The first."},
            ],
        },
        {"messages": [("user", "a.jpg", "b.jpg", "Which is older?"), ("assistant", "The first.")]},
    ),
    "llava-text-alone": (
        "llava",
        {
            "id": "8",
            "image": None,
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        },
        {"messages": [("user", "Hi"), ("assistant", "Ho")]},
    ),
    "captions-image-folder": (
        "captions",
        {"image": PICTURE, "text": "a red square"},
        {"image": PICTURE, "captions": ["a red square"]},
    ),
    "captions-webdataset": (
        "captions",
        {"__key__": "000", "__url__": "0.tar", "png": b"...", "txt": "a red square\n", "json": {"width": 8}},
        {"image": b"...", "captions": ["a red square"]},
    ),
    "conversations-parts": (
        "conversations",
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief.", "image": None}]},
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "And this?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A square."}, {"type": "image"}]},
            ],
            "images": ["a.png", "b.png"],
        },
        {
            "messages": [
                ("system", "Be brief."),
                ("user", "a.png", "And this?"),
                ("assistant", "A square.", "b.png"),
            ]
        },
    ),
    "shapes": (
        "shapes",
        {
            "image": PICTURE,
            "captions": ["a red circle"],
            "prompts": ["a circle"],
            "questions": ["how many shapes are there?"],
            "answers": ["one"],
            "label": 0,
            "messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}],
            "scene": "{}",
        },
        {
            "image": PICTURE,
            "captions": ["a red circle"],
            "prompts": ["a circle"],
            "class_id": 0,
            "questions": [("how many shapes are there?", ["one"])],
            "messages": [("user", "Which?"), ("assistant", "This.")],
        },
    ),
    "text-line": ("text", {"text": "Plain words."}, {"captions": ["Plain words."]}),
}


def told(record: Record) -> dict:
    """What of `record` is not empty, with each message as (role, text or image, ...)."""
    messages = [
        (m["role"], *(part[part["type"]] for part in m["content"] if part["type"] != "class")) for m in record.messages
    ]
    fields = {**vars(record), "messages": messages}
    return {name: value for name, value in fields.items() if value is not None and value != []}
