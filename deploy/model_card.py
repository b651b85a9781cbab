"""README.md of a student/ folder: a model card, as the Hugging Face Hub reads it, of what a run knows of it."""

from __future__ import annotations

import json
from typing import Any

MARK = "<!-- Written by kdlite at every save of the student, until this line is removed. -->"
LOADING = {
    "timm": """\
```python
import timm

model = timm.create_model("local-dir:student", pretrained=True).eval()  # this folder; hf-hub:USER/NAME once uploaded
```
""",
    "torchvision": """\
```python
import json, torchvision
from safetensors.torch import load_model

config = json.load(open("student/config.json"))  # this folder
model = torchvision.models.get_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
load_model(model, "student/model.safetensors")
model.eval()
```
""",
    "file": "The network is built by code that does not come with it: the function `{architecture}`.\n",
}


def model_card(config: dict[str, Any]) -> str:
    """Markdown under a metadata header in YAML, of a student's config.json."""
    about, metrics = config.get("training", {}), config.get("metrics", {})
    quoted = json.dumps  # a JSON string is a YAML string
    library = config["library"] if config["library"] in ("timm", "torchvision") else "kdlite"
    data, sizes = about.get("data", "unknown"), (about.get("train_images", "?"), about.get("val_images", "?"))
    lines = [
        "---", f"library_name: {library}", "pipeline_tag: image-classification", "license: other",
        "license_name: unknown", "tags:", "- image-classification", "- knowledge-distillation", "- kdlite", "---", MARK,
        "", f"# {config['architecture']}, {config['num_classes']} classes", "",
        f"Trained by kdlite: {about.get('method', 'method unknown')}.", "",
    ]  # fmt: skip
    facts = {
        "data": "{}, {} training and {} validation images".format(data, *sizes),
        "weights began as": about.get("began", "noise"),
        "teacher": about.get("teacher"),
        "epochs": f"{metrics.get('epoch', '?')}, the best of {about.get('epochs', '?')}",
        "input": "{} channels, {} x {} pixels".format(*config["input_size"])
        + f", {config['interpolation']}, {100 * config['crop']:g} % of the resized side",
        "mean and std of the normalisation": f"{config['mean']}, {config['std']}",
    }
    if "val_top1" in metrics:
        facts["accuracy on the validation images"] = (
            f"top-1 {metrics['val_top1']:.2f} %, top-5 {metrics['val_top5']:.2f} % (n = {sizes[1]})"
        )
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += ["- licence of the weights: *to be filled in, here and in the header*"]
    lines += ["- licence of the data: *to be filled in*", "", "## Use", ""]
    plain = not config["small_stem"] and not (library == "torchvision" and config["input_size"][0] != 3)
    usable = config["library"] == "file" or plain
    lines += [LOADING[config["library"]].replace("{architecture}", config["architecture"])] if usable else [
        "Its first layers are not the library's own: `deploy.student.load_student` of kdlite loads it.\n"
    ]  # fmt: skip
    names = ", ".join(map(quoted, config["label_names"][:20]))
    more = f" and {config['num_classes'] - 20} more, in config.json" if config["num_classes"] > 20 else ""
    return "\n".join([*lines, f"Classes, in the order of the logits: {names}{more}.", ""])
