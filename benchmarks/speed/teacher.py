"""The teacher, ViT-B/16 at 512 x 512 in float32, against open_clip and transformers, same weights.

    OMP_NUM_THREADS=1 python benchmarks/speed/teacher.py

Ours also makes the dense tokens that the method clusters. The CLS tokens must be equal first. The
last row is K-Means and fusion of the same images, which may take 8 % of the forward pass.
"""

import open_clip
import torch
from open_clip import CLIPTextCfg, CLIPVisionCfg
from race import finish, floor_ms, race, report, start
from torch import Tensor, nn
from transformers import CLIPConfig as PeerConfig
from transformers import CLIPModel as Peer

from cliptteacher.clip.convert import to_openai_names
from cliptteacher.clip.model import CLIP, CLIPConfig, resize_positions
from cliptteacher.plm import PixelLearningModule

SIDE, LAYERS, WIDTH = 512, 12, 768
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def build_all() -> tuple[CLIP, Peer, nn.Module]:
    peer = Peer(PeerConfig(vision_config={"patch_size": 16}, text_config={"eos_token_id": 2}))
    ours = CLIP(CLIPConfig())
    weights = to_openai_names(peer.state_dict())
    ours.load_state_dict(weights)
    vision = CLIPVisionCfg(layers=LAYERS, width=WIDTH, patch_size=16, image_size=SIDE)
    other = open_clip.model.CLIP(512, vision, CLIPTextCfg(), quick_gelu=True)
    positions = "visual.positional_embedding"  # open_clip knows one size of images
    weights[positions] = resize_positions(weights[positions], (SIDE // 16, SIDE // 16))
    other.load_state_dict(weights)
    return ours.eval(), peer.eval(), other.eval()


def peer_cls(peer: Peer, images: Tensor) -> Tensor:
    pixels = (images - MEAN) / STD
    output = peer.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)
    return peer.visual_projection(output.pooler_output)


def open_cls(other: nn.Module, images: Tensor) -> Tensor:
    return other.encode_image((images - MEAN) / STD)


def multiply_adds(batch: int) -> float:
    """Of the layers: 12 C^2 for each token, and 2 C for each pair of tokens."""
    tokens = (SIDE // 16) ** 2 + 1
    return batch * LAYERS * (12 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH)


def measure(rounds: int) -> list[dict[str, object]]:
    ours, peer, other = build_all()
    rows = []
    with torch.inference_mode():
        for batch in (1, 4):
            images = torch.rand(batch, 3, SIDE, SIDE)
            own = ours.encode_image(images).cls
            torch.testing.assert_close(own, peer_cls(peer, images), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(own, open_cls(other, images), rtol=1e-3, atol=1e-4)
            ways = {
                "ours, CLS and dense tokens": lambda x=images: ours.encode_image(x),
                "open_clip, CLS token": lambda x=images: open_cls(other, x),
                "transformers, CLS token": lambda x=images: peer_cls(peer, x),
            }
            times = race(ways, max(2, rounds // (2 * batch)))  # seconds each
            floor = floor_ms(multiply_adds(batch))
            rows.append(report(f"teacher, batch {batch}", times, 1.1, floor))
        dense = ours.encode_image(images).dense
        labels = torch.zeros(4, SIDE, SIDE, dtype=torch.uint8)
        labels[:, : SIDE // 2] = 255
        module = PixelLearningModule(dense.shape[1])
        groups = race({"groups": lambda: module.group_tokens(dense, labels)}, rounds)["groups"]
    allowed = 0.08 * times["ours, CLS and dense tokens"]
    values = {"K-Means and fusion": groups, "8 % of the teacher's pass": allowed}
    return [*rows, report("grouping, batch 4", values, 1.0)]


if __name__ == "__main__":
    finish(measure(start(__doc__)))
