"""PyTorch: training step time of a transformer in bfloat16 and of a ResNet-18, divided by the bare time."""

import random

import torch
import transformers

from lookahead_optim.torch import Lookahead
from on_device.shapes import summary
from programs.of_torch import wait
from timing import Program, in_turn, ratios

PERIOD = 6


def cases(device):
    """Return the cases, functions without arguments by name."""
    return {
        f"{name}, {'compiled' if is_compiled else 'eager'}": lambda name=name, is_compiled=is_compiled: training(
            MODELS[name], is_compiled, device
        )
        for is_compiled in ((True, False) if device != "cpu" else (False,))
        for name in MODELS
    }


def transformer(device):
    """Return a decoder in bfloat16, and a function that computes its loss."""
    sizes = {"n_layer": 8, "n_head": 8, "n_embd": 512, "vocab_size": 16384, "n_positions": 512}
    if device == "cpu":
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False)).to(device, torch.bfloat16)
    shape = (16, sizes["n_positions"])
    tokens = torch.randint(sizes["vocab_size"], shape, device=device)
    return model, lambda model: model(input_ids=tokens, labels=tokens).loss


def resnet(device):
    """Return a ResNet-18 with channels last, and a function that computes its loss in bfloat16."""
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "embedding_size": 64}
    if device == "cpu":
        sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", num_labels=1000)
    model = transformers.ResNetForImageClassification(config).to(device, memory_format=torch.channels_last)
    side, rows = (224, 64) if device != "cpu" else (32, 2)
    images = torch.randn(rows, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (rows,), device=device)

    def loss(model):
        with torch.autocast(device, torch.bfloat16):
            return torch.nn.functional.cross_entropy(model(pixel_values=images).logits, labels)

    return model, loss


MODELS = {"transformer, bfloat16": transformer, "ResNet-18": resnet}


def training(make, is_compiled, device):
    """Return times of about 200 training steps of each program, in turn, one cycle at a time."""
    programs = {}
    torch.compiler.reset()
    torch.set_float32_matmul_precision("high")
    for name in ("bare", "lookahead-optim", "bare, again"):
        torch.manual_seed(0)
        model, loss = make(device)
        model.train()
        inner = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        optimizer = Lookahead(inner, PERIOD) if name == "lookahead-optim" else inner
        forward = torch.compile(model) if is_compiled else model

        def step(optimizer=optimizer, forward=forward, loss=loss):
            optimizer.zero_grad()
            loss(forward).backward()
            optimizer.step()

        programs[name] = Program(step, wait)
        parameters = sum(one.numel() for one in model.parameters())
    times = in_turn(programs, PERIOD, 2 if device == "cpu" else 34, random.Random(0))
    return {
        "parameters": parameters,
        "bare, seconds": summary(times["bare"]),
        "lookahead-optim": summary(ratios(times["lookahead-optim"], times["bare"])),
        "bare, again": summary(ratios(times["bare, again"], times["bare"])),
    }
