"""CLIP: pictures and texts in one space; its text half is the context of Stable Diffusion 1.x.

Paper    Radford et al. 2021, arXiv:2103.00020, section 2.4; sizes of ViT-L/14 in appendix F
Tensors  ids (B, N) tokens -> states (B, N, width); pixels (B, 3, S, S) -> states (B, 1 + patches, width)
         pixels are normalised: (x - mean) / std of CLIP per channel, x in [0, 1]; S = config.image_size
Weights  Hugging Face names (model.safetensors; text_encoder/ of Stable Diffusion); `position_ids` is not used
Copying  this file stands alone: torch only
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEGACY_EOS = 2  # what OpenAI's own config.json says, though CLIP's end token is 49407


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text transformer, named as in config.json; the defaults are ViT-L/14's."""

    vocab_size: int = 49408  # rows of the token embedding
    hidden_size: int = 768  # width of the states
    intermediate_size: int = 3072  # width inside the MLPs
    num_hidden_layers: int = 12  # transformer layers
    num_attention_heads: int = 12  # divides hidden_size
    max_position_embeddings: int = 77  # longest sequence of tokens
    hidden_act: str = "quick_gelu"  # "quick_gelu" (OpenAI's weights) or "gelu" (OpenCLIP's)
    layer_norm_eps: float = 1e-5  # of every LayerNorm
    eos_token_id: int = _LEGACY_EOS  # end token; 2: the largest id in the sequence, as in the first files

    def __post_init__(self) -> None:
        _check_transformer(self)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the vision transformer, named as in config.json; the defaults are ViT-L/14's."""

    hidden_size: int = 1024  # width of the states
    intermediate_size: int = 4096  # width inside the MLPs
    num_hidden_layers: int = 24  # transformer layers
    num_attention_heads: int = 16  # divides hidden_size
    image_size: int = 224  # side of the picture in pixels
    patch_size: int = 14  # side of a patch in pixels; divides image_size
    num_channels: int = 3  # of the picture
    hidden_act: str = "quick_gelu"  # "quick_gelu" (OpenAI's weights) or "gelu" (OpenCLIP's)
    layer_norm_eps: float = 1e-5  # of every LayerNorm

    def __post_init__(self) -> None:
        _check_transformer(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPVisionConfig.patch_size is {self.patch_size}: expected a divisor of image_size, "
                f"{self.image_size}"
            )


@dataclass(frozen=True)
class CLIPConfig:
    """Both halves and the space they share; the defaults are ViT-L/14's."""

    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)  # the text transformer
    vision: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)  # the vision transformer
    projection_dim: int = 768  # width of the common space


def _check_transformer(config: CLIPTextConfig | CLIPVisionConfig) -> None:
    name = type(config).__name__
    if config.hidden_act not in ("quick_gelu", "gelu"):
        raise ValueError(f"{name}.hidden_act is {config.hidden_act!r}: expected 'quick_gelu' or 'gelu'")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"{name}.num_attention_heads is {config.num_attention_heads}: expected a divisor of hidden_size, "
            f"{config.hidden_size}"
        )


class Attention(nn.Module):
    """Multi-head self-attention; with `causal`, a token sees itself and the tokens before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D/heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(-2))  # (B, N, D)


class MLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.hidden_act = hidden_act
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = self.fc1(x)  # (B, N, intermediate_size)
        x = x * torch.sigmoid(1.702 * x) if self.hidden_act == "quick_gelu" else F.gelu(x)
        return self.fc2(x)


class EncoderLayer(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a shortcut (pre-norm)."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers, of which the last `skip` may be left out."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, causal: bool, skip: int = 0) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for i in range(len(self.layers) - skip):
            x = self.layers[i](x, causal)
        return x


class TextEmbeddings(nn.Module):
    """Token plus position embeddings, drawn small (0.02 and 0.01) as CLIP trains them."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.added: Tensor | None  # (n, D), of the ids from vocab_size on
        self.register_buffer("added", None, persistent=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, D)."""
        return self.tokens(ids) + self.position_embedding.weight[: ids.shape[1]]

    def tokens(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, D), of added ids their own vectors."""
        if self.added is None:
            return self.token_embedding(ids)
        size = self.token_embedding.num_embeddings
        known = self.token_embedding(ids.clamp(max=size - 1))
        return torch.where((ids < size)[..., None], known, self.added[(ids - size).clamp(min=0)])


class VisionEmbeddings(nn.Module):
    """One embedding per patch, led by the class embedding, plus position embeddings."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.class_embedding, std=width**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=width**-0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + patches, D)."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class TextTransformer(nn.Module):
    """The text half without its name prefix: embeddings, causal transformer, final LayerNorm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor, clip_skip: int = 0) -> Tensor:
        """(B, N) -> (B, N, D), see CLIPTextModel.forward."""
        longest, layers = self.config.max_position_embeddings, self.config.num_hidden_layers
        if ids.ndim != 2 or ids.shape[1] > longest:
            raise ValueError(
                f"CLIP text ids have shape {tuple(ids.shape)}: expected (B, N) with N up to {longest}; "
                "truncate the prompt"
            )
        if not 0 <= clip_skip < layers:
            raise ValueError(
                f"clip_skip is {clip_skip}: expected 0 to {layers - 1} for a model of {layers} layers"
            )
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True, skip=clip_skip))

    def pooled(self, ids: Tensor) -> Tensor:
        """(B, N) -> (B, D), see CLIPTextModel.pooled."""
        eos = self.config.eos_token_id
        ends = ids * (ids < self.config.vocab_size) if eos == _LEGACY_EOS else (ids == eos).int()
        first_end = ends.argmax(dim=1)  # (B,), of equal values the first
        return self(ids)[torch.arange(len(ids), device=ids.device), first_end]


class VisionTransformer(nn.Module):
    """The vision half without its name prefix: embeddings, LayerNorm, transformer, last LayerNorm."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # sic, as on disk
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, 1 + patches, D), see CLIPVisionModel.forward."""
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ValueError(
                f"CLIP pixels are {tuple(pixels.shape[-2:])}: expected ({size}, {size}); "
                "resize and crop the picture first"
            )
        return self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)

    def pooled(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D), see CLIPVisionModel.pooled."""
        return self.post_layernorm(self(pixels)[:, 0])


def add_vectors(text: TextTransformer, vectors: Tensor) -> int:
    """Let `text` take further ids, for `vectors` (n, D) in place of token embeddings; returns the first id.

    Those of textual inversion (Gal et al. 2022, arXiv:2208.01618). They are no part of the state dict.
    ValueError for another width than D = hidden_size.
    """
    embeddings, width = text.embeddings, text.config.hidden_size
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}: expected (n, {width})")
    before = 0 if embeddings.added is None else len(embeddings.added)
    new = vectors.to(embeddings.token_embedding.weight)
    embeddings.added = new if embeddings.added is None else torch.cat([embeddings.added, new])
    return text.config.vocab_size + before


class CLIPTextModel(nn.Module):
    """The text half alone, as Stable Diffusion ships it (`text_encoder/`)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config)

    def forward(self, ids: Tensor, clip_skip: int = 0) -> Tensor:
        """States (B, N, hidden_size) of tokens `ids` (B, N), N up to 77, after the final LayerNorm.

        `clip_skip` leaves out that many of the last layers; 1 is the "Clip skip 2" of other tools.
        ValueError for a sequence that is too long, or where no layer would be left.
        """
        return self.text_model(ids, clip_skip)

    def pooled(self, ids: Tensor) -> Tensor:
        """The state (B, hidden_size) at each sequence's first end token, which has seen the whole text.

        With `eos_token_id` 2 the end token is taken to be the largest id, as it is in CLIP's own vocabulary;
        a sequence without any end token gives the state at its start.
        """
        return self.text_model.pooled(ids)


class CLIPVisionModel(nn.Module):
    """The vision half alone."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """States (B, 1 + patches, hidden_size) of normalised `pixels` (B, 3, S, S), the class token first.

        They are before the last LayerNorm. ValueError for another picture size than config.image_size.
        """
        return self.vision_model(pixels)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The class token's state (B, hidden_size) after the last LayerNorm."""
        return self.vision_model.pooled(pixels)


class CLIPModel(nn.Module):
    """Both halves and their projections: `encode_image` and `encode_text`; there is no `forward`.

    exp(logit_scale) * cosine similarity of the two is the logit that CLIP trains (paper, figure 3).
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config.text)
        self.vision_model = VisionTransformer(config.vision)
        self.visual_projection = nn.Linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.full((), math.log(1 / 0.07)))  # paper, section 2.5

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Embedding (B, projection_dim), not normalised, of normalised `pixels` (B, 3, S, S)."""
        return self.visual_projection(self.vision_model.pooled(pixels))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embedding (B, projection_dim), not normalised, of tokens `ids` (B, N)."""
        return self.text_projection(self.text_model.pooled(ids))


CLIP_VIT_L14 = CLIPConfig()
SD15_TEXT = CLIP_VIT_L14.text
