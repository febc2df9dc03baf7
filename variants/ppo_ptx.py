"""PPO-ptx (Ouyang et al. 2022, eq. 2): PPO with the SFT loss on demonstrations mixed in.

    python -m variants.ppo_ptx --ptx_coef 0.1

The policy forgets what no reward asks for. The gradient of the SFT loss, added before each of its steps,
keeps it able to say what people have written.
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
    tokenizer, block_size = Tokenizer.load(cfg.init, cfg.system), load(cfg.init).config.block_size
    demonstrations = encode_demonstrations(tokenizer, conversations, block_size, "demonstrations",
                                           cfg.max_dropped)

    def sft_gradient(run, policy):
        chosen = run.rng.sample(demonstrations, min(cfg.ptx_batch, len(demonstrations)))
        for some, share in run.micro_batches(chosen, weights=[sum(d.learn) for d in chosen]):
            (share * (cfg.ptx_coef * demonstrations_loss(policy, run, some))).backward()
    ppo.train(cfg, auxiliary_loss=sft_gradient)


if __name__ == "__main__":
    main(Config, train, __doc__)
