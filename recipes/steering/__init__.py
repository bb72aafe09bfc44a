"""Methods that steer a policy update, one a file; configs name them ``litropy.recipes.steering.GRPO`` and so on."""

from litropy.recipes.steering.aggregation import ConstantLength, SequenceMean, SequenceSum, TokenMean
from litropy.recipes.steering.cispo import CISPO
from litropy.recipes.steering.clip_cov import ClipCov
from litropy.recipes.steering.dr_grpo import DrGRPO
from litropy.recipes.steering.dynamic_sampling import DynamicSampling
from litropy.recipes.steering.entropy_bonus import EntropyBonus
from litropy.recipes.steering.forking_tokens import ForkingTokens
from litropy.recipes.steering.grpo import GRPO
from litropy.recipes.steering.gspo import GSPO
from litropy.recipes.steering.importance import MaskedImportance, TruncatedImportance
from litropy.recipes.steering.kl_cov import KLCov
from litropy.recipes.steering.min_p import MinP
from litropy.recipes.steering.pi_controller import PIController
from litropy.recipes.steering.ppo_clip import PPOClip
from litropy.recipes.steering.reference_kl import ReferenceKL
from litropy.recipes.steering.rloo import RLOO
from litropy.recipes.steering.sampler import Sampler
from litropy.recipes.steering.skywork import SkyworkController
from litropy.recipes.steering.top_p import TopP
from litropy.recipes.steering.unclipped import Unclipped

__all__ = [
    "CISPO",
    "GRPO",
    "GSPO",
    "RLOO",
    "ClipCov",
    "ConstantLength",
    "DrGRPO",
    "DynamicSampling",
    "EntropyBonus",
    "ForkingTokens",
    "KLCov",
    "MaskedImportance",
    "MinP",
    "PIController",
    "PPOClip",
    "ReferenceKL",
    "Sampler",
    "SequenceMean",
    "SequenceSum",
    "SkyworkController",
    "TokenMean",
    "TopP",
    "TruncatedImportance",
    "Unclipped",
]
