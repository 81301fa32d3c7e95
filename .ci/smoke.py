"""A run of what is installed, away from the repository: two steps of training, one prediction.

cd /tmp && python /path/to/.ci/smoke.py
"""

import tempfile
from pathlib import Path

import torch

import cliptteacher as ct

here = Path(ct.__file__).resolve()
assert "site-packages" in here.parts, f"the installed package must be imported, got {here}"
torch.manual_seed(0)
clip = ct.load_clip("miniworld")  # the bundled weights are in the package
world = ct.data.open_dataset("miniworld", None, "train")
seen = ct.data.SeenOnly(world)
student = ct.build_segmenter("fpn_small", channels=clip.embed_dim)
model = ct.CLIPTeacher(clip, student, seen.class_names)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = (torch.stack(column) for column in zip(*(seen[k] for k in range(4)), strict=True))
for _ in range(2):
    losses = model(images, labels)
    losses["total"].backward()
    optimizer.step()
    optimizer.zero_grad()
assert torch.isfinite(losses["total"])
names = world.class_names
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "student.pt")
    text = ct.class_text_features(clip, names)
    ct.save_segmenter(file, student, names=names, unseen=world.unseen, text_features=text)
    segment = ct.load_segmenter(file)
    found = segment(images[0])
    again = segment(images[0], words=["grass", "sand"], clip=clip)
assert found.shape == again.shape == images.shape[2:] and int(again.max()) < 2
picture = ct.visualize.overlay(images[0], found, names)
print(
    f"{model!r}, cliptteacher {ct.__version__}, torch {torch.__version__}: passed, {picture.size}"
)
