"""PPO-ptx: PPO with the SFT loss on demonstrations added. Ouyang et al. (2022, eq. 2) add pretraining text.

    python -m variants.ppo_ptx --ptx_coef 0.1

PPO may lose abilities that the reward does not measure. Against this, the gradient of the SFT loss, times
ptx_coef, is added before each optimiser step of the policy.
"""
from dataclasses import dataclass

import ppo
from data import loading
from data.batches import encode_demonstrations
from data.tokenizer import Tokenizer
from runtime.flags import flag
from runtime.launch import main
from runtime.models import load
from sft import demonstrations_loss


@dataclass
class Config(ppo.Config):
    out: str = flag("out/ppo_ptx", "folder that the run writes")
    ptx_coef: float = flag(0.1, "weight of the SFT loss", 0)
    ptx_data: str = flag(loading.WORLD, "demonstrations: a folder of the world's, or a file")
    ptx_batch: int = flag(32, "demonstrations per optimiser step", 1)


def train(cfg):
    conversations, _ = loading.load("demonstrations", cfg.ptx_data, "", cfg.max_dropped)
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    size = load(cfg.init).config.block_size             # which reads no weights: see runtime.models.load
    demonstrations = encode_demonstrations(tokenizer, conversations, size, "demonstrations")

    def add_sft_gradient(run, policy):
        rows = run.rng.sample(demonstrations, min(cfg.ptx_batch, len(demonstrations)))
        for some, share in run.micro_batches(rows, weights=[sum(d.learn) for d in rows]):   # as in sft.train
            (share * (cfg.ptx_coef * demonstrations_loss(policy, run, some))).backward()
    ppo.train(cfg, auxiliary_loss=add_sft_gradient)


if __name__ == "__main__":
    main(Config, train, __doc__)
