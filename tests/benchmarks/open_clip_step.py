"""Steps of open_clip as it comes, for `tests.benchmarks.bare`; needs open_clip and nothing of Duet.

    PYTHON tests/benchmarks/open_clip_step.py ROWS SIZE FOLDER    one step for each line that comes in

open_clip's model of timm's ResNet-50 and a BERT-base, its loss, its clamp of the temperature, AdamW, fp32; images and
captions as its loader hands them over, captions padded to its 77 tokens. Each line that goes out is a step's seconds of
the CPU, after a first one with the versions.
"""

import json
import math
import sys
import time

MEAN_TOKENS, CONTEXT = 22, 77


def main() -> None:
    import open_clip  # only where this is run by itself
    import torch
    import transformers
    from open_clip.model import CustomTextCLIP

    rows, size, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    transformers.BertConfig().save_pretrained(folder)
    vision = {"timm_model_name": "resnet50", "timm_pool": "", "timm_proj": "linear", "image_size": size}
    text = {"hf_model_name": folder, "hf_model_pretrained": False, "hf_proj_type": "linear", "context_length": CONTEXT}
    model = CustomTextCLIP(768, vision, text, output_dict=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    loss_of = open_clip.ClipLoss()
    images, ids = torch.randn(rows, 3, size, size), torch.zeros(rows, CONTEXT, dtype=torch.long)
    ids[:, :MEAN_TOKENS] = torch.randint(1000, 30_000, (rows, MEAN_TOKENS))
    print(json.dumps({"torch": torch.__version__, "open_clip": open_clip.__version__}), flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        optimizer.zero_grad()
        loss_of(**model(images, ids)).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
