"""Uses a hand-off where this project is not installed: ``python -I hub_session.py HANDOFF REFERENCE FOLDER``.

REFERENCE holds images (0.jpg and following) and tensors.safetensors: what the project itself computes of them. The
hand-off is in the cache of huggingface_hub, too, as lab/lavit.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

handoff, reference, folder = map(Path, sys.argv[1:])
assert not [name for name in ("models", "pretrain", "data_pipeline", "timm") if importlib.util.find_spec(name)]
wanted = load_file(reference / "tensors.safetensors")
photographs = [Image.open(path) for path in sorted(reference.glob("*.jpg"))]
torch.manual_seed(0)


def load(source, **changes):
    model, report = AutoModelForImageClassification.from_pretrained(
        source, trust_remote_code=True, output_loading_info=True, **changes
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model


model = load(handoff)
with torch.no_grad():
    for size in ("native", "other"):
        apart = (model(pixel_values=wanted[size]).logits - wanted[f"{size}.logits"]).abs().max().item()
        print(f"{size} size: logits differ by at most {apart:g}")
        assert apart <= 1e-6
    maps = model.forward_features(wanted["native"])
    for stage, found in enumerate(maps):
        assert torch.equal(found, wanted[f"maps.{stage}"]), stage
    assert len(maps) == 4
    assert torch.equal(load("lab/lavit")(wanted["native"]).logits, model(wanted["native"]).logits)

processor = AutoImageProcessor.from_pretrained(handoff)
pixels = processor(photographs, return_tensors="pt").pixel_values
# In steps of 8 bits, with the bounds that tests/data_pipeline/test_resize.py has for torch's resizing and Pillow's.
apart = (pixels - wanted["pixels"]).abs() * wanted["std"][:, None, None] * 255
print(f"evaluation pixels differ by {apart.mean():.3g} on average and at most {apart.max():.3g} of 255 steps")
assert apart.mean() < 0.25
assert apart.max() <= 5

classify = pipeline("image-classification", model=str(handoff), trust_remote_code=True)
with torch.no_grad():
    expected = model(pixels[:1]).logits[0].softmax(0)
names = json.loads((handoff / "config.json").read_text())["class_names"]
answer = classify(photographs[0], top_k=len(names))
assert {one["label"] for one in answer} == set(names)
assert all(abs(one["score"] - expected[names.index(one["label"])]) < 1e-6 for one in answer)
assert answer[0]["label"] == names[expected.argmax()]

# Other classes: a fresh head. Three steps of plain torch, then three of the Trainer, on one batch.
tuned = load(handoff, num_labels=3, ignore_mismatched_sizes=True)
kept = {name: weight for name, weight in tuned.lavit.state_dict().items() if not name.startswith("head.")}
assert all(torch.equal(weight, model.lavit.state_dict()[name]) for name, weight in kept.items())
labels = torch.arange(len(pixels)) % 3


@torch.no_grad()
def loss_of(network):
    return network.eval()(pixels, labels=labels).loss.item()


losses = [loss_of(tuned)]
optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
for _ in range(3):
    tuned.train()(pixels, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
losses.append(loss_of(tuned))
arguments = TrainingArguments(
    folder / "trainer", max_steps=3, per_device_train_batch_size=len(pixels), learning_rate=1e-3, use_cpu=True,
    report_to=[], save_strategy="no", disable_tqdm=True,
)  # fmt: skip
rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
trainer = Trainer(tuned, arguments, train_dataset=rows, processing_class=processor)
assert trainer.train().global_step == 3
losses.append(loss_of(tuned))
print("fine-tuned, loss before, after torch's loop, after the Trainer:", losses)
assert losses[0] > losses[1] > losses[2]

trainer.save_model(folder / "saved")
again = load(folder / "saved")
with torch.no_grad():
    assert torch.equal(again(pixels).logits, tuned(pixels).logits)
saved = json.loads((folder / "saved/config.json").read_text())
assert not {"metrics", "recipe", "weights_blake2", "config_blake2"} & saved.keys(), "facts about other weights"
assert torch.equal(
    AutoImageProcessor.from_pretrained(folder / "saved")(photographs, return_tensors="pt").pixel_values, pixels
)

# A hand-off that was trained with apex's LayerNorm runs where there is no apex.
config = model.config
config.architecture["norm"] = "apex"
fresh = AutoModelForImageClassification.from_config(config, trust_remote_code=True).lavit
assert fresh.stages[0].blocks[0].mlp.fc1.weight.std() > 0.1, "LaViT's initialization, not that of transformers"
