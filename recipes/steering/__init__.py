"""Methods that steer a policy update, one a file; configs name them ``litropy.recipes.steering.GRPO`` and so on."""

from litropy.recipes.steering.adaptive_clip import AdaptiveClip
from litropy.recipes.steering.adaptive_temperature import AdaptiveTemperature
from litropy.recipes.steering.advantage_redistribution import AdvantageRedistribution
from litropy.recipes.steering.aggregation import ConstantLength, SequenceMean, SequenceSum, TokenMean
from litropy.recipes.steering.ares_reward import ARESReward
from litropy.recipes.steering.bucket_kl import BucketKL
from litropy.recipes.steering.ce_gppo import CEGPPO
from litropy.recipes.steering.cispo import CISPO
from litropy.recipes.steering.clip_cov import ClipCov
from litropy.recipes.steering.dr_grpo import DrGRPO
from litropy.recipes.steering.dynamic_sampling import DynamicSampling
from litropy.recipes.steering.entropy_advantage import EntropyAdvantage
from litropy.recipes.steering.entropy_bonus import EntropyBonus
from litropy.recipes.steering.forking_tokens import ForkingTokens
from litropy.recipes.steering.grpo import GRPO
from litropy.recipes.steering.gspo import GSPO
from litropy.recipes.steering.importance import MaskedImportance, TruncatedImportance
from litropy.recipes.steering.kl_cov import KLCov
from litropy.recipes.steering.mastered_tokens import MasteredTokens
from litropy.recipes.steering.min_p import MinP
from litropy.recipes.steering.mirostat import Mirostat
from litropy.recipes.steering.pear import PEAR
from litropy.recipes.steering.pi_controller import PIController
from litropy.recipes.steering.ppo_clip import PPOClip
from litropy.recipes.steering.pshw import PSHW
from litropy.recipes.steering.recent_sample_recovery import RecentSampleRecovery
from litropy.recipes.steering.reference_kl import ReferenceKL
from litropy.recipes.steering.rloo import RLOO
from litropy.recipes.steering.sampler import Sampler
from litropy.recipes.steering.siren import SIREN
from litropy.recipes.steering.skywork import SkyworkController
from litropy.recipes.steering.steer import STEER
from litropy.recipes.steering.tea import TEA
from litropy.recipes.steering.ter import TER
from litropy.recipes.steering.token_group_average import TokenGroupAverage
from litropy.recipes.steering.top_h import TopH
from litropy.recipes.steering.top_p import TopP
from litropy.recipes.steering.unclipped import Unclipped

__all__ = [
    "CEGPPO",
    "CISPO",
    "GRPO",
    "GSPO",
    "PEAR",
    "PSHW",
    "RLOO",
    "SIREN",
    "STEER",
    "TEA",
    "TER",
    "ARESReward",
    "AdaptiveClip",
    "AdaptiveTemperature",
    "AdvantageRedistribution",
    "BucketKL",
    "ClipCov",
    "ConstantLength",
    "DrGRPO",
    "DynamicSampling",
    "EntropyAdvantage",
    "EntropyBonus",
    "ForkingTokens",
    "KLCov",
    "MaskedImportance",
    "MasteredTokens",
    "MinP",
    "Mirostat",
    "PIController",
    "PPOClip",
    "RecentSampleRecovery",
    "ReferenceKL",
    "Sampler",
    "SequenceMean",
    "SequenceSum",
    "SkyworkController",
    "TokenGroupAverage",
    "TokenMean",
    "TopH",
    "TopP",
    "TruncatedImportance",
    "Unclipped",
]
