"""A causal language model, generated from token by token in ONNX Runtime: Pack -> with_cache -> ONNX -> generate.

Weights that were never trained to be ternary talk nonsense. Train first (examples/quickstart.py shows how); what
follows here is the same for a trained student.

    python examples/generate.py [FOLDER_OF_A_CAUSAL_LANGUAGE_MODEL]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import ti_fx
from ti_fx.export import to_onnx, with_cache
from ti_fx.export.run.generate import OnnxCausalLM
from ti_fx.passes import Pack, QuantizeActivations, Ternarize

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "folder", nargs="?", help="of a Hugging Face model; left out: a small Llama, random weights"
)
parser.add_argument("--encoding", default="nbits2", help="nbits2 keeps the weights packed in memory")
parser.add_argument("--out", type=Path, default=Path("runs/generate"))
options = parser.parse_args()
torch.manual_seed(0)

if options.folder:
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
else:
    small = {"vocab_size": 2000, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**small, num_attention_heads=4))
model.eval()

tokens = torch.randint(1, model.config.vocab_size, (2, 16))
example = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
student = ti_fx.capture(model, example).eval()
ti_fx.Pipeline(Ternarize(), QuantizeActivations(encoding=options.encoding), Pack())(student)

# The same student once more, with keys and values of the tokens before as inputs and outputs.
cached, inputs = with_cache(student, model, example)
report = to_onnx(
    *(cached, options.out / "decoder.onnx", inputs),
    config=model.config,
    generation_config=model.generation_config,
)
print(report)

# transformers' own generate: greedy search, sampling, beams, batches padded on the left. With to_onnx(..., tokenizer=)
# ti_fx.export.pipeline(report.path)("a prompt") takes and gives text.
runtime = OnnxCausalLM(report.path, model.config)
written = runtime.generate(
    tokens[:, :4], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
)
print(written)

# What PyTorch's student says without any cache. A token beside another in score may fall on either side.
ids = tokens[:, :4]
for _ in range(12):
    ids = torch.cat(
        (ids, student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)), 1
    )
print(f"{(ids == written).float().mean():.0%} of the tokens are those of PyTorch's student")
