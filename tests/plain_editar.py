"""A second implementation of the published networks in plain PyTorch: the oracle that the package is tested against.

It shares no code with the package. Module and buffer names are those of the published checkpoints, so a state dict
of these classes *is* a file in the published layout. Everything is the naive form: fused query-key-value projection,
adjacent rotation pairs as complex numbers, a dense boolean mask, no cache, decoding by running the whole sequence anew.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, turns, allowed):
        batch_size, seq_len, width = x.shape
        q, k, v = (part.view(batch_size, seq_len, self.num_heads, -1) for part in self.wqkv(x).split(width, dim=-1))
        q, k = rotate_adjacent_pairs(q, turns), rotate_adjacent_pairs(k, turns)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (width // self.num_heads) ** 0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return self.wo(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch_size, seq_len, width))


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        inner = int(2 * 4 * width / 3)
        inner += -inner % 256
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.feed_forward = FeedForward(width)
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)

    def forward(self, x, turns, allowed):
        x = x + self.attention(self.attention_norm(x), turns, allowed)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionProjection(nn.Module):
    def __init__(self, text_width, width):
        super().__init__()
        self.fc1 = nn.Linear(text_width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    def __init__(self, text_length, text_width, width):
        super().__init__()
        self.cap_proj = CaptionProjection(text_width, width)
        self.register_buffer("uncond_embedding", torch.zeros(text_length, text_width))


def rotate_adjacent_pairs(x, turns):
    """Multiply the complex numbers (x[2i], x[2i+1]) of (batch, seq_len, heads, head_dim) with those of `turns`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(-2)


class PlainEditAR(nn.Module):
    """The published EditAR decoder."""

    def __init__(
        self, vocab=64, width=32, num_layers=2, num_heads=2, grid_size=4, text_length=5, text_width=16, feature_width=12
    ):
        super().__init__()
        self.grid_size, self.text_length, self.pairs = grid_size, text_length, width // num_heads // 2
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.cls_embedding = CaptionEmbedding(text_length, text_width, width)
        self.register_buffer("img_uncond_embedding", torch.zeros(grid_size**2, width))
        self.layers = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = RMSNorm(width)
        self.output = nn.Linear(width, vocab, bias=False)
        self.alignment = nn.Conv2d(width, feature_width, kernel_size=2, stride=2)

    def compute_turns(self, height, width):
        """One complex rotation per position and pair: rows in the first half, columns in the second, zeros for text."""
        frequencies = [10000 ** (-2 * i / self.pairs) for i in range(self.pairs // 2)]
        table = []
        for offset in (0, self.grid_size):
            for row in range(offset, offset + height):
                for column in range(offset, offset + width):
                    table.append([row * f for f in frequencies] + [column * f for f in frequencies])
        angles = torch.tensor(table, dtype=torch.float64)
        turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
        text = torch.zeros(self.text_length, self.pairs, dtype=torch.complex64)
        return torch.cat([turns[: height * width], text, turns[height * width :]])

    def hidden_states(self, source, text, target, drop_source=None, drop_text=None, grid=None):
        """Final-norm states of every position of [source][text][target], each sample embedded by itself."""
        height, width = grid or (self.grid_size, self.grid_size)
        null_rows = [r * self.grid_size + c for r in range(height) for c in range(width)]
        samples = []
        for i in range(len(source)):
            image, caption = self.tok_embeddings(source[i]), text[i]
            if drop_source is not None and drop_source[i]:
                image = self.img_uncond_embedding[null_rows]
            if drop_text is not None and drop_text[i]:
                caption = self.cls_embedding.uncond_embedding
            samples.append(torch.cat([image, self.cls_embedding.cap_proj(caption), self.tok_embeddings(target[i])]))
        x = torch.stack(samples)
        seq_len = x.shape[1]
        allowed = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
        turns = self.compute_turns(height, width)[:seq_len]
        for layer in self.layers:
            x = layer(x, turns, allowed)
        return self.norm(x)

    def forward(self, source, text, target, **conditions):
        """Logits of all target positions, each given the tokens before it."""
        return self.output(self.hidden_states(source, text, target[:, :-1], **conditions)[:, -target.shape[1] :])

    def loss(self, source, text, target, **conditions):
        log_probabilities = self(source, text, target, **conditions).log_softmax(-1)
        return -log_probabilities.gather(-1, target[..., None]).mean()

    def distillation_features(self, source, text, target, grid=None, **conditions):
        """What the `alignment` convolution makes of the states that predict target tokens: (batch, cells, width)."""
        height, width = grid or (self.grid_size, self.grid_size)
        states = self.hidden_states(source, text, target[:, :-1], grid=grid, **conditions)[:, -target.shape[1] :]
        return self.alignment(states.reshape(-1, height, width, states.shape[-1]).permute(0, 3, 1, 2)).flatten(2).mT

    @torch.no_grad()
    def generate(self, source, text, guidance=1.0, steps=None, grid=None, drop_source=None):
        """Greedy target tokens, every one from a run over the whole sequence."""
        target = source[:, :0]
        keep, drop = torch.zeros(len(source), dtype=torch.bool), torch.ones(len(source), dtype=torch.bool)
        for _ in range(steps or source.shape[1]):
            cond, uncond = (
                self.output(
                    self.hidden_states(source, text, target, drop_source=drop_source, drop_text=drop_text, grid=grid)
                )[:, -1]
                for drop_text in (keep, drop)
            )
            target = torch.cat([target, (uncond + guidance * (cond - uncond)).argmax(-1, keepdim=True)], dim=1)
        return target


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return h + (self.nin_shortcut(x) if "nin_shortcut" in self._modules else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))
        weights = (torch.einsum("bcq,bck->bqk", q, k) / q.shape[1] ** 0.5).softmax(-1)
        return x + self.proj_out(torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape))


class Resample(nn.Module):
    """Halve or double the resolution around one 3×3 convolution."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else x.repeat_interleave(2, 2).repeat_interleave(2, 3))


class ConvLevel(nn.Module):
    """Residual blocks of one resolution, with attention at the lowest, then a change of resolution."""

    def __init__(self, in_channels, out_channels, num_blocks, with_attention, resample):
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(in_channels if j == 0 else out_channels, out_channels) for j in range(num_blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_blocks if with_attention else 0))
        if resample is not None:
            setattr(self, resample, Resample(out_channels, down=resample == "downsample"))
        self.resample = resample

    def forward(self, x):
        for j, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        return x if self.resample is None else getattr(self, self.resample)(x)


class ConvStack(nn.Module):
    """The encoder (`down`) or the decoder."""

    def __init__(self, in_channels, out_channels, first_channels, level_channels, num_blocks, down):
        super().__init__()
        lowest = level_channels[-1] if down else first_channels
        last = len(level_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, first_channels, 3, padding=1)
        before = [first_channels, *level_channels[:-1]]
        self.conv_blocks = nn.ModuleList(
            ConvLevel(
                before[i],
                channels,
                num_blocks,
                with_attention=i == (last if down else 0),
                resample=None if i == last else ("downsample" if down else "upsample"),
            )
            for i, channels in enumerate(level_channels)
        )
        self.mid = nn.ModuleList([ResnetBlock(lowest, lowest), AttentionBlock(lowest), ResnetBlock(lowest, lowest)])
        self.norm_out = nn.GroupNorm(32, level_channels[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(level_channels[-1], out_channels, 3, padding=1)
        self.mid_first = not down

    def forward(self, x):
        x = self.conv_in(x)
        for block in [*self.mid, *self.conv_blocks] if self.mid_first else [*self.conv_blocks, *self.mid]:
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, num_codes, code_width):
        super().__init__()
        self.embedding = nn.Embedding(num_codes, code_width)
        self.register_buffer("codebook_used", torch.zeros(65536))


class PlainVQ(nn.Module):
    """The published VQ tokenizer: VQ-16 with multipliers (1, 1, 2, 2, 4), VQ-8 with (1, 2, 2, 4)."""

    def __init__(self, base_channels=32, multipliers=(1, 1, 2), latent_channels=24, code_width=8, num_codes=64):
        super().__init__()
        channels = [base_channels * multiplier for multiplier in multipliers]
        self.encoder = ConvStack(3, latent_channels, base_channels, channels, 2, down=True)
        self.decoder = ConvStack(latent_channels, 3, channels[-1], channels[::-1], 3, down=False)
        self.quantize = Codebook(num_codes, code_width)
        self.quant_conv = nn.Conv2d(latent_channels, code_width, 1)
        self.post_quant_conv = nn.Conv2d(code_width, latent_channels, 1)

    def encode(self, pixels):
        """(batch, N) codes of highest cosine similarity, in raster order."""
        latents = self.quant_conv(self.encoder(pixels)).flatten(2).mT
        return F.cosine_similarity(latents[:, :, None], self.quantize.embedding.weight[None, None], dim=-1).argmax(-1)

    def decode_code(self, codes, grid):
        rows = F.normalize(self.quantize.embedding.weight, dim=-1)[codes]
        return self.decoder(self.post_quant_conv(rows.mT.reshape(len(codes), -1, *grid)))


def swish(x):
    return x * x.sigmoid()


def redraw(module, seed=0):
    """Draw every parameter and buffer anew, head, norms and null embeddings included, and switch to evaluation.

    Freshly made heads and norms would hide errors: a zero head makes all logits equal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif tensor.dim() > 1:
                tensor.copy_(noise * (1 if "embed" in name else 1.5 * tensor[0].numel() ** -0.5))
            else:
                tensor.copy_(0.1 * noise)
    return module.eval()
