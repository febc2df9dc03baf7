"""PPO whose reward model says where its score is a guess: see variants/cautious.py.

    python reward_model.py --ensemble 5
    python -m variants.cautious_ppo --pessimism worst
"""
from dataclasses import dataclass

import ppo
from data.tokenizer import Tokenizer
from runtime.flags import flag
from runtime.launch import main
from runtime.rewards import find_reward
from variants.cautious import Cautious


@dataclass
class Config(ppo.Config):
    out: str = flag("out/cautious_ppo", "folder that the run writes")
    pessimism: str = flag("none", "score by an ensemble: its mean less a deviation, or its worst head",
                          choices=("none", "deviation", "worst"))
    pessimism_coef: float = flag(1.0, "c of mean − c·standard deviation", 0)
    ood_penalty: float = flag(0.0, "taken off the score of an answer unlike those that the reward model has "
                              "seen (OOD), for each threshold that it is beyond the threshold", 0)
    stop_ood: float = flag(1.0, "end the run where more than this share of a rollout is OOD", 0, 1)


def train(cfg):
    tokenizer = Tokenizer.load(cfg.init, cfg.system)
    ppo.train(cfg, find_reward(cfg.reward, tokenizer, lambda *given: Cautious(cfg, *given)))


if __name__ == "__main__":
    main(Config, train, __doc__)
