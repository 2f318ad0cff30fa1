"""LeWM (Maes et al. 2026) on the data and in the CPU time of a run of ours, in the harness and with the search of both.

    python benchmarks/lewm.py runs/tworoom --seconds 271

Needs the extra swm, and transformers for its ViT. Its networks and losses are stable-worldmodel's; here are its training
loop and its settings: batches of 32 and a learning rate of 5e-5 with its ViT-tiny (patch size 16), 64 and 5e-4 with our
convolutions in the ViT's place. They were not tuned, and minutes on a CPU are far below what it was made for.
"""

import argparse
import json
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from datamodules import Trajectories
from jepa_lightning import load
from jepa_lightning.harness import JEPACost, evaluate, stable_worldmodel
from jepa_lightning.networks.conv import ConvEncoder
from jepa_lightning.weights.runs import data_of

DIM, FRAMES, SIGREG_WEIGHT = 192, 3, 0.09
SETTINGS = {"vit": (32, 5e-5), "cnn": (64, 5e-4)}
"""Encoder -> batch size and learning rate."""


class AsViT(nn.Module):
    """Our convolutions, called as LeWM calls its ViT: (N, 3, H, W) -> the embedding as if it were the class token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = ConvEncoder((size, size), 3, (16, 32, 64), DIM)

    def forward(self, pixels: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.encoder(pixels)[:, None])


def build(encoder: str, size: int, action_dim: int) -> Any:
    """LeWM as its package configures it, for images of `size` pixels."""
    module = stable_worldmodel(".wm.lewm.module")
    if encoder == "vit":
        from transformers import ViTConfig, ViTModel

        heads = {"hidden_size": DIM, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 4 * DIM}
        network: nn.Module = ViTModel(ViTConfig(image_size=size, patch_size=16, **heads), add_pooling_layer=False)
    else:
        network = AsViT(size)
    predictor = module.Predictor(
        num_frames=FRAMES, depth=6, heads=16, mlp_dim=2048, input_dim=DIM, hidden_dim=DIM, dropout=0.1, dim_head=64
    )
    actions = module.Embedder(input_dim=action_dim, smoothed_dim=action_dim, emb_dim=DIM)
    heads_of = [module.MLP(DIM, 2048, DIM, norm_fn=nn.BatchNorm1d) for _ in range(2)]
    return stable_worldmodel(".wm.lewm").LeWM(network, predictor, actions, *heads_of)


def normalized(frames: Tensor) -> Tensor:
    """Images in [0, 1] with the mean and standard deviation that its ViT expects."""
    return (frames - 0.5) / 0.5


def train(model: Any, data: Trajectories, batch_size: int, learning_rate: float, seconds: float) -> int:
    """Train for so many seconds of CPU time, and return the number of steps."""
    regularizer = stable_worldmodel(".wm.loss").SIGReg()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-3)
    clips = data._clips("train")
    began, steps = time.process_time(), 0
    model.train()
    while time.process_time() - began < seconds:
        chosen = torch.randint(len(clips), (batch_size,))
        batch = data.observe(clips.__getitems__([(steps, index) for index in chosen.tolist()]))
        assert batch.actions is not None
        found = model.encode({"pixels": normalized(batch.observations), "action": batch.actions})
        predicted = model.predict(found["emb"][:, :-1], found["act_emb"])
        loss = (predicted - found["emb"][:, 1:]).square().mean() + SIGREG_WEIGHT * regularizer(found["emb"].transpose(0, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.eval()
    return steps


class LeWMCost(nn.Module):
    """LeWM asked by the planner of the harness, with images as it was trained on and actions within the limits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_cost(self, info: dict[str, Any], candidates: Tensor) -> Tensor:
        """Costs (E, N) of candidates (E, N, H, A)."""
        if "lewm" not in info:
            images = {name: normalized(info[name].movedim(-1, -3).float() / 255) for name in ("pixels", "goal")}
            goal = self.model.encode({"pixels": images["goal"][:, 0]})["emb"]  # (E, 1, D)
            # Its own encoding of the goal fits batches of one episode alone.
            info["lewm"] = images | {"action": candidates[:, :, :1], "goal_emb": goal[:, None]}
        return self.model.get_cost(info["lewm"], candidates.clamp(-1, 1))

    criterion = get_cost


def main() -> None:
    """Print a table, and write it as JSON if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="Run directory of a dynamics JEPA of TwoRoom.")
    parser.add_argument("--seconds", type=float, required=True, help="CPU seconds of its training.")
    parser.add_argument("--environment", default="swm/TwoRoom-v1")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="File for the figures.")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    known = data_of(given.run)
    assert known is not None
    arguments = {name: value for name, value in known["init_args"].items() if name != "collect"}
    data = Trajectories(**(arguments | {"seed": arguments.get("seed", 0)}))
    short = Trajectories(**(arguments | {"windows": FRAMES + 1}))
    jepa: Any = load(given.run)
    costs: dict[str, nn.Module] = {"ours": JEPACost(jepa)}
    steps: dict[str, int] = {}
    for encoder, settings in SETTINGS.items():
        model = build(encoder, jepa.image_size, data.action_dim)
        steps[encoder] = train(model, short, *settings, given.seconds)
        costs[f"LeWM, {encoder}"] = LeWMCost(model)
        print(f"LeWM, {encoder}: {steps[encoder]} steps in {given.seconds:g} CPU seconds", flush=True)
    found: dict[str, Any] = {}
    search = {"samples": given.samples, "iterations": given.iterations, "elites": max(2, given.samples // 8)}
    for offset, budget in ((25, 50), (75, 100)):
        for name, cost in costs.items():
            history = jepa.history if name == "ours" else 1
            row = evaluate(
                data,
                given.environment,
                cost,
                episodes=given.episodes,
                offset=offset,
                budget=budget,
                history=history,
                **search,
            )
            found[f"{name}, offset {offset}"] = row
            print(
                f"offset {offset}, {name}: {row['success']:.2f} ({row['standard_error']:.2f}), {row['seconds']:.0f} s",
                flush=True,
            )
    if given.out:
        with open(given.out, "w") as file:
            json.dump({"figures": found, "steps": steps, "search": search, "seed": given.seed}, file, indent=2)


if __name__ == "__main__":
    main()
