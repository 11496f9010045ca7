"""The tiny model: its sizes, and the folder it is published as."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ppllava_export.modules.config import (
    EncoderConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from ppllava_export.modules.encoder import Encoder
from ppllava_export.modules.model import PPLLaVA
from ppllava_export.modules.text import extend_positions

from .vocabulary import (
    TEXT_SPECIAL,
    token_id,
    write_decoder_tokenizer,
    write_json,
    write_text_tokenizer,
)

NUM_FRAMES = 8
FRAME_SIZE = 72
PATCH_SIZE = 8
_TRAINED_POSITIONS = 77
_EXTENDED_POSITIONS = 248
_CONTEXT = 1024
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Vocabulary:
    """Both tokenizers of a run folder; they are built when the folder has none."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "clip" / "tokenizer.json").exists():
            (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
            (folder / "clip").mkdir(exist_ok=True)
            write_decoder_tokenizer(folder / "checkpoint", _CONTEXT)
            write_text_tokenizer(folder / "clip", _TRAINED_POSITIONS)
        self.decoder = Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))
        self.text = Tokenizer.from_file(str(folder / "clip" / "tokenizer.json"))


def model_config(vocabulary: Vocabulary) -> ModelConfig:
    """Returns the tiny model's sizes: 3.7 million parameters, of which 2.0 in the decoder."""
    tower = EncoderConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=5, num_attention_heads=4
    )
    reader = EncoderConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4
    )
    image_token = token_id(vocabulary.decoder, "<image>")
    end = token_id(vocabulary.decoder, "</s>")
    return ModelConfig(
        name="tiny_world",
        vision=VisionConfig(tower, image_size=FRAME_SIZE, patch_size=PATCH_SIZE),
        text=TextConfig(
            reader,
            vocab_size=vocabulary.text.get_vocab_size(),
            positions=_EXTENDED_POSITIONS,
            extended=True,
            bos_token_id=token_id(vocabulary.text, TEXT_SPECIAL[0]),
            eos_token_id=token_id(vocabulary.text, TEXT_SPECIAL[1]),
        ),
        projection_dim=64,
        decoder={
            "model_type": "llama",
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "head_dim": 32,
            "vocab_size": vocabulary.decoder.get_vocab_size(),
            "max_position_embeddings": _CONTEXT,
            "rms_norm_eps": 1e-5,
            "bos_token_id": token_id(vocabulary.decoder, "<s>"),
            "eos_token_id": end,
            "pad_token_id": token_id(vocabulary.decoder, "<unk>"),
            "tie_word_embeddings": False,
        },
        feature_layer=-2,
        grid=(FRAME_SIZE // PATCH_SIZE, FRAME_SIZE // PATCH_SIZE),
        kernel=(2, 3, 3),
        stride=(2, 3, 3),
        image_kernel=(1, 3, 3),
        image_stride=(1, 3, 3),
        temperature=0.005,
        max_frames=64,
        image_token_index=image_token,
        image_mean=_CLIP_MEAN,
        image_std=_CLIP_STD,
        eos_token_ids=(end,),
    )


def _grid_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Returns a (1 + h * w, width) table of 2-D sines to start from, zero for the class token.

    With positions as small as CLIP's at random, the patches' own content drowns them.
    """
    frequencies = torch.logspace(-1, 1, width // 4, base=2) * torch.pi / max(grid)
    tables = []
    for length in grid:
        angles = torch.arange(length)[:, None] * frequencies
        tables.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    rows, columns = tables
    table = torch.cat([rows.repeat_interleave(grid[1], dim=0), columns.repeat(grid[0], 1)], dim=1)
    return torch.cat([torch.zeros(1, width), table])


def fresh_model(config: ModelConfig, seed: int) -> PPLLaVA:
    """Returns a seeded model; the text tower's positions are extended from 77 to 248."""
    torch.manual_seed(seed)
    model = PPLLaVA(config)
    width = config.text.encoder.hidden_size
    embeddings = model.multi_modal_projector.clip_text_model.embeddings
    extended = extend_positions(torch.randn(_TRAINED_POSITIONS, width) * 0.02)
    tower = model.vision_tower.vision_model.embeddings
    with torch.no_grad():
        for name in ("position_embedding", "position_embedding_res"):
            embeddings.get_parameter(name).copy_(extended)
        embeddings.token_embedding.weight.normal_(std=0.02)
        tower.position_embedding.weight.copy_(
            _grid_positions(config.grid, config.vision.encoder.hidden_size)
        )
        tower.get_parameter("class_embedding").normal_(std=0.02)
        for block in model.vision_tower.vision_model.encoder.layers:
            for layer in block.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        model.image_newline.normal_(std=0.02)
    return model


def normalise(frames: Tensor, config: ModelConfig) -> Tensor:
    """Returns pixel_values (n, 3, S, S) of uint8 frames (n, S, S, 3)."""
    mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
    return ((frames.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _published_tensors(model: PPLLaVA) -> dict[str, Tensor]:
    """Returns fp16 tensors by published name, with the parts of CLIP's tower nothing reads."""
    tower = model.config.vision.encoder
    tensors = dict(model.state_dict())
    last = Encoder(tower, 1).layers[0].state_dict()
    prefix = f"vision_tower.vision_model.encoder.layers.{tower.num_hidden_layers - 1}."
    tensors |= {prefix + name: tensor for name, tensor in last.items()}
    norm = nn.LayerNorm(tower.hidden_size).state_dict()
    tensors |= {f"vision_tower.vision_model.post_layernorm.{n}": t for n, t in norm.items()}
    return {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}


def _encoder_fields(encoder: EncoderConfig) -> dict[str, object]:
    return {
        "hidden_size": encoder.hidden_size,
        "intermediate_size": encoder.intermediate_size,
        "num_hidden_layers": encoder.num_hidden_layers,
        "num_attention_heads": encoder.num_attention_heads,
        "hidden_act": encoder.hidden_act,
        "layer_norm_eps": encoder.layer_norm_eps,
    }


def save_checkpoint(model: PPLLaVA, folder: Path) -> None:
    """Writes `folder`/checkpoint and `folder`/clip in the layout of published checkpoints.

    The tokenizers are already there (`Vocabulary`).
    """
    config = model.config
    checkpoint, clip = folder / "checkpoint", folder / "clip"
    staged = checkpoint / "model.safetensors.partial"
    save_file(_published_tensors(model), str(staged), metadata={"format": "pt"})
    staged.replace(checkpoint / "model.safetensors")
    vision = {
        "model_type": "clip_vision_model",
        **_encoder_fields(config.vision.encoder),
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        "projection_dim": config.projection_dim,
    }
    text = {
        "model_type": "clip_text_model",
        **_encoder_fields(config.text.encoder),
        "vocab_size": config.text.vocab_size,
        "max_position_embeddings": _TRAINED_POSITIONS,
        "projection_dim": config.projection_dim,
        "bos_token_id": config.text.bos_token_id,
        "eos_token_id": config.text.eos_token_id,
        "pad_token_id": config.text.eos_token_id,
    }
    write_json(
        checkpoint / "config.json",
        {
            "architectures": ["LlavaInterleaveForConditionalGeneration"],
            "model_type": "llava_next",
            "torch_dtype": "float16",
            "btadapter": False,
            "qwen": False,
            "clip_weight": "../clip",
            "extend_clip": True,
            "max_T": config.max_frames,
            "frame_shape": list(config.grid),
            "pooling": "ppllava",
            "pooling_kernel": list(config.kernel),
            "pooling_stride": list(config.stride),
            "pooling_temp": config.temperature,
            "image_pooling_kernel": list(config.image_kernel),
            "image_pooling_stride": list(config.image_stride),
            "image_grid_pinpoints": [[72, 144], [144, 72], [144, 144]],
            "image_token_index": config.image_token_index,
            "image_seq_length": config.grid[0] * config.grid[1],
            "ignore_index": -100,
            "hidden_size": config.decoder_width,
            "pad_token_id": config.decoder["pad_token_id"],
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": False,
            "vision_feature_layer": config.feature_layer,
            "vision_feature_select_strategy": "default",
            "vision_config": vision,
            "text_config": config.decoder,
        },
    )
    write_json(
        checkpoint / "generation_config.json",
        {key: config.decoder[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    size = {"height": FRAME_SIZE, "width": FRAME_SIZE}
    write_json(
        checkpoint / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": size,
            "resample": 3,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "do_convert_rgb": True,
            "num_frames": NUM_FRAMES,
        },
    )
    write_json(
        checkpoint / "processor_config.json",
        {
            "processor_class": "LlavaNextProcessor",
            "image_token": "<image>",
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
        },
    )
    write_json(
        clip / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.projection_dim,
            "text_config": text,
            "vision_config": vision,
        },
    )
