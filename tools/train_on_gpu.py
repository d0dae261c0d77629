"""Continue a training of recipe `tin190` on a GPU: `python tools/train_on_gpu.py START ROOT OUT`.

A step of `dualtoken-vit train` is over six hundred small operations, which the CPU starts more slowly than a large GPU
computes them. Here the images of recipe `tin190` stay in the GPU's memory, and a whole step with its augmentation is
one CUDA graph. OUT gets best.safetensors and metrics.jsonl; `results/README.md` has what came of it.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import timm
import torch
import torch.nn.functional as F
from timm.optim import muon
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from dualtoken_vit import RECIPES, load_model
from dualtoken_vit.checkpoint import save_checkpoint
from dualtoken_vit.data.classification import build_datasets
from dualtoken_vit.recipes import Optim
from dualtoken_vit.tasks.optim import build_optimizer

SIZES = ((0.4, (96,)), (1.0, (128, 128, 96)))  # until this share of the time, in turns
FLAT = 0.5  # share of the time after which the learning rate decays
CUTMIX_UNTIL = 0.85
CUTMIX, SCALE, RATIO, JITTER, SMOOTHING, DROP_PATH = 0.5, (0.25, 1.0), 4 / 3, 0.3, 0.1, 0.05
MEAN, STD, GREY = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.299, 0.587, 0.114)


class Muon:
    """timm's Muon with AdamW for the rest, with matrices of one shape orthogonalised together.

    `lr` is a tensor, so that a CUDA graph of `step` follows it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device):
        self.lr, self.count = torch.zeros((), device=device), torch.zeros((), device=device)
        self.options = optimizer.param_groups[0]
        self.coefficients = muon.resolve_ns_coefficients(self.options["ns_coefficients"], muon._COEFFICIENTS)
        self.matrices: dict[tuple, list[Tensor]] = defaultdict(list)
        self.others: dict[float, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if group.get("use_fallback") or not muon._is_suitable_for_muon(parameter):
                    self.others[group["weight_decay"]].append(parameter)
                else:
                    self.matrices[tuple(parameter.shape), group["weight_decay"]].append(parameter)
        self.momenta = {key: torch.zeros_like(torch.stack(found)) for key, found in self.matrices.items()}
        self.moments = {
            decay: [[torch.zeros_like(one) for one in found] for _ in range(2)] for decay, found in self.others.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        options, self.count = self.options, self.count.add_(1)
        for (shape, decay), found in self.matrices.items():
            gradient = torch.stack([one.grad for one in found])
            momentum = self.momenta[shape, decay].lerp_(gradient, 1 - options["momentum"])
            update = gradient.lerp(momentum, options["momentum"]) if options["nesterov"] else momentum
            update = muon.zeropower_via_newtonschulz(
                update.flatten(2) if update.ndim > 3 else update,
                options["ns_steps"],
                self.coefficients,
                eps=options["eps"],
                safety_factor=options["safety_factor"],
                scale_eps=options["scale_eps"],
            )
            scale = muon.get_lr_scale(update.shape[1:], options["adjust_lr_fn"])
            torch._foreach_mul_(found, 1 - self.lr * decay)
            torch._foreach_add_(found, (update.float() * (-self.lr * scale)).reshape(len(found), *shape).unbind())
        beta1, beta2 = options["betas"]
        for decay, found in self.others.items():
            gradients, (first, second) = [one.grad for one in found], self.moments[decay]
            torch._foreach_lerp_(first, gradients, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            torch._foreach_mul_(found, 1 - self.lr * decay)
            scales = torch._foreach_sqrt(second)
            torch._foreach_div_(scales, (1 - beta2**self.count).sqrt())
            torch._foreach_add_(scales, options["eps"])
            updates = torch._foreach_div(first, scales)
            torch._foreach_mul_(updates, -self.lr / (1 - beta1**self.count))
            torch._foreach_add_(found, updates)


class Trainer:
    """A network with its optimiser and images; `graph` is a step at one image size."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int):
        """Images (N, 3, H, W) uint8 and labels (N,), on the network's device."""
        self.model, self.images, self.labels, self.device = model, images, labels, images.device
        self.optimizer = Muon(build_optimizer(model, Optim(optimizer="muon")), self.device)
        self.indices = torch.arange(batch_size, device=self.device) % len(images)
        self.flips = torch.ones(batch_size, device=self.device)  # 1, or -1 for a mirrored image
        self.cutmix, self.loss, self.right = torch.zeros(3, device=self.device).unbind()
        self.graphs: dict[int, Callable[[], None]] = {}

    def _uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(len(self.indices), *shape, device=self.device).uniform_(low, high)

    def _constant(self, values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=self.device).view(1, 3, 1, 1)

    def _augmented(self, size: int, constants: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Images (B, 3, size, size), with a part of the image before in some, and the shares of these parts (B,)."""
        mean, std, grey = constants
        ratio = self._uniform(-math.log(RATIO), math.log(RATIO)).exp().sqrt()
        area = self._uniform(*SCALE).sqrt()
        width, height = (area * ratio).clamp(max=1), (area / ratio).clamp(max=1)
        left, top = self._uniform(-1, 1) * (1 - width), self._uniform(-1, 1) * (1 - height)
        rows = (width * self.flips, 0 * width, left), (0 * width, height, top)
        theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
        grid = F.affine_grid(theta, [len(theta), 3, size, size], align_corners=False)
        options = dict(mode="bicubic", padding_mode="reflection", align_corners=False)
        x = F.grid_sample(self.images[self.indices].float() / 255, grid, **options).clamp(0, 1)
        brightness, contrast, saturation = (self._uniform(1 - JITTER, 1 + JITTER, 1, 1, 1) for _ in range(3))
        x = brightness * x
        x = x + (x.mean((1, 2, 3), keepdim=True) - x) * (1 - contrast)
        light = (x * grey).sum(1, keepdim=True)
        x = ((light + (x - light) * saturation).clamp(0, 1) - mean) / std
        side = (1 - self._uniform(0, 1)).sqrt() * (self._uniform(0, 1) < self.cutmix)
        places = (torch.arange(size, device=self.device) + 0.5) / size
        inside_x, inside_y = ((places - self._uniform(0, 1, 1)).abs() < side[:, None] / 2 for _ in range(2))
        part = (inside_y[:, :, None] & inside_x[:, None, :])[:, None]
        x = torch.where(part, x.roll(1, 0), x)
        return x.contiguous(memory_format=torch.channels_last), part.float().mean((1, 2, 3))

    def _step(self, size: int, constants: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            x, share = self._augmented(size, constants)
        labels = self.labels[self.indices]
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(x)
        own, other = (
            F.cross_entropy(logits.float(), target, label_smoothing=SMOOTHING, reduction="none")
            for target in (labels, labels.roll(1, 0))
        )
        loss = ((1 - share) * own + share * other).mean()
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.add_(loss.detach())
        self.right.add_((logits.argmax(1) == labels).float().mean())

    def graph(self, size: int) -> Callable[[], None]:
        """A step at this size. Those before its capture have learning rate 0, and change the optimiser's moments and
        the running statistics of the stem only."""
        if size not in self.graphs:
            constants = tuple(map(self._constant, (MEAN, STD, GREY)))
            if self.device.type != "cuda":
                return lambda: self._step(size, constants)
            rate = self.optimizer.lr.clone()
            self.optimizer.lr.zero_()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(size, constants)
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                self._step(size, constants)
            self.optimizer.lr.copy_(rate)
            self.graphs[size] = captured.replay
        return self.graphs[size]

    def fit(self, seconds: float, lr: float, file: TextIO) -> None:
        """Train for so long, without the time of the captures; `file` gets a line of JSON for each epoch."""
        batch_size, count = len(self.indices), len(self.images)
        for size in {size for _, sizes in SIZES for size in sizes}:
            self.graph(size)
        sides = torch.randint(0, 2, (count,), device=self.device)
        start, epoch, step, progress = time.monotonic(), 0, 0, 0.0
        while progress < 1:
            steps = 0
            self.loss.zero_()
            self.right.zero_()
            batches = torch.randperm(count, device=self.device)[: count - count % batch_size].split(batch_size)
            for indices in batches:
                progress = (time.monotonic() - start) / seconds
                decay = 0.5 * (1 + math.cos(math.pi * max(min(progress, 1) - FLAT, 0) / (1 - FLAT)))
                self.optimizer.lr.fill_(lr * min(progress / 0.02, decay))
                self.cutmix.fill_(CUTMIX * (progress < CUTMIX_UNTIL))
                self.indices.copy_(indices)
                self.flips.copy_(1 - 2 * ((sides[indices] + epoch) % 2))
                sizes = next((sizes for end, sizes in SIZES if progress < end), SIZES[-1][1])
                self.graph(sizes[step % len(sizes)])()
                step, steps = step + 1, steps + 1
                if self.device.type == "cuda" and step % 4 == 0:  # else the time would be that of the queueing
                    torch.cuda.synchronize()
                if progress >= 1:
                    break
            epoch += 1
            row = dict(epoch=epoch, seconds=round(time.monotonic() - start, 1), size=max(sizes))
            row |= dict(lr=self.optimizer.lr.item(), images=steps * batch_size)
            row |= dict(train_loss=self.loss.item() / steps, train_top1=self.right.item() / steps)
            print(json.dumps(row), file=file, flush=True)
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", help="a best.safetensors of recipe tin190, or dualtoken_vit_small_mix: the package's")
    parser.add_argument("root", help="the folder of Tiny-ImageNet, see recipe tin190")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=309)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    args = parser.parse_args()
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    data, _ = build_datasets(replace(RECIPES["tin190"].data, root=args.root), 3)
    data.transform = pil_to_tensor
    images, labels = map(torch.cat, zip(*DataLoader(data, 1000, num_workers=2), strict=True))
    start, about = load_model(args.start)
    model = timm.create_model(about.model, **about.model_args, drop_path_rate=DROP_PATH)
    model.load_state_dict(start.state_dict())
    model.to(args.device).train()
    trainer = Trainer(model, images.to(args.device), labels.to(args.device), args.batch_size)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "metrics.jsonl", "w") as file:
        trainer.fit(args.seconds, args.lr, file)
    size = max(SIZES[-1][1])
    save_checkpoint(
        args.out / "best.safetensors",
        model.cpu(),
        preprocessing=about.preprocessing | {"input_size": (3, size, size)},
        metrics={},
        **{key: getattr(about, key) for key in ("task", "class_names", "recipe", "model_args")},
    )


if __name__ == "__main__":
    main()
