"""A vision-language model with random weights, made on the spot: Qwen2-VL, small, and complete.

    python -m benchmarks.looking FOLDER

It has all that a real one has (a vision tower, a tokenizer with Qwen's marks, an image processor, a
chat template), reads pictures of any size, and says nonsense that depends on them. Engines, servers
and benchmarks can be run with it where no weights can be had.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from unimodal.pipeline.captioning.prompt import load_prompt

MARKS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(folder: Path, width: int = 128, layers: int = 2, context: int = 4096) -> Path:
    """Write such a model, in float32; heads are 64 wide, as vLLM wants them on CPUs."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words = load_prompt("dense", "en").before("video", "json").splitlines()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(MARKS),
        # Of single bytes only ASCII, so that what it says at random is UTF-8.
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"],
        show_progress=False,
    )
    bpe.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    end, _, stop, seen, unseen, image, video = tokenizer.convert_tokens_to_ids(list(MARKS))
    heads = width // 64
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": context,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [8, 12, 12],
                "rope_theta": 1e6,
            },
            "bos_token_id": end,
            "eos_token_id": stop,
            "initializer_range": 0.1,  # that what it says hangs on what it sees
        },
        vision_config={
            "depth": layers,
            "embed_dim": width // 2,
            "hidden_size": width,
            "num_heads": heads,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        vision_start_token_id=seen,
        vision_end_token_id=unseen,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    closing = tokenizer.convert_tokens_to_ids(['"', "<|im_end|>"])
    with torch.no_grad():
        model.lm_head.weight[closing] *= 1.5  # some answers end, in JSON too
    model.save_pretrained(folder)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=4 * 28**2, max_pixels=64 * 28**2),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    asked = parser.parse_args()
    print(make(asked.folder, asked.width, asked.layers))
