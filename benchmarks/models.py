"""A small transformer and a small ResNet, for Keras 2, Keras 3 and PyTorch, with random data."""

import numpy as np

from timing import Program

TOKENS, LENGTH, WIDTH, HEADS, BATCH = 256, 64, 128, 4, 16
CLASSES, IMAGE, CHANNELS = 10, 32, (16, 32, 64)


def data(name, batches=1):
    """Return inputs and labels for some batches: tokens, or images with the channels last."""
    rng = np.random.default_rng(0)
    rows = BATCH * batches
    if name == "transformer":
        x = rng.integers(TOKENS, size=(rows, LENGTH), dtype="int32")
        return x, np.roll(x, -1, axis=1)
    return rng.normal(size=(rows, IMAGE, IMAGE, 3)).astype("float32"), rng.integers(CLASSES, size=rows, dtype="int32")


def of_keras(keras, name):
    """Return a Keras model that returns logits, and the inputs and labels of a batch."""
    layers = keras.layers
    if name == "transformer":
        inputs = keras.Input((LENGTH,), dtype="int32")
        x = layers.Embedding(TOKENS, WIDTH)(inputs)
        for _ in range(2):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y)])
            y = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(WIDTH)(y)])
        outputs = layers.Dense(TOKENS)(layers.LayerNormalization()(x))
    else:
        inputs = x = keras.Input((IMAGE, IMAGE, 3))
        for channels in CHANNELS:
            x = layers.Conv2D(channels, 3, 2, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
            y = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.Add()([x, layers.BatchNormalization()(y)]))
        outputs = layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs), *data(name)


def fit_program(keras, case, optimizer, **compile_arguments):
    """Return a program that trains by `fit`. One call makes two cycles."""
    model, *_ = of_keras(keras, case.model)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **compile_arguments)
    batches = 2 * case.period
    x, y = data(case.model, batches)
    return Program(lambda: model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0), steps=batches)


def of_torch(name, device):
    """Return a PyTorch model that returns logits along the last axis, and the inputs and labels of a batch."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    x, y = (torch.tensor(one, device=device) for one in data(name))
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        model = nn.Sequential(nn.Embedding(TOKENS, WIDTH), encoder, nn.Linear(WIDTH, TOKENS))
        return model.to(device), x, y.long()

    class Block(nn.Module):
        def __init__(self, before, channels):
            super().__init__()
            self.first = nn.Sequential(
                nn.Conv2d(before, channels, 3, 2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
            )
            self.second = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            )

        def forward(self, x):
            x = self.first(x)
            return torch.relu(x + self.second(x))

    blocks = [Block(before, channels) for before, channels in zip((3, *CHANNELS), CHANNELS)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], CLASSES))
    return model.to(device), x.permute(0, 3, 1, 2).contiguous(), y.long()
