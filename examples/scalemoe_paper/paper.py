"""What ScaleMoE (Choi, Hong, Han, Kim, PACT'25) publishes, and all that this example takes from it. No figure here is ours."""

import numpy as np

# Section "Set-up": 4 AWS p4d nodes x 8 A100; batch 512 x 128 tokens, hidden 768, fp32; 12 layers, all MoE, 64 experts, top-2.
RANKS, LAYERS, EXPERTS, TOPK = 32, 12, 64, 2
TOKENS_PER_RANK = 512 * 128 // RANKS
HIDDEN_SIZE, BYTES_PER_VALUE = 768, 4

# Table II: seconds per iteration. Heterogeneous: one node's network at half its speed.
STAGES = ("Tutel (padded, 2DH)", "+ adaptive all-to-all", "+ clustering", "+ remapping")
COLUMNS = ("homogeneous BERT", "homogeneous GPT", "heterogeneous BERT", "heterogeneous GPT")
TABLE_II_S = np.array([[10.60, 10.42, 20.04, 19.67], [8.64, 9.41, 9.20, 9.89], [6.64, 6.10, 7.22, 6.18], [6.20, 5.78, 6.96, 5.94]])

# Section "Motivation": share of the baseline's iteration that the all-to-all takes with 64 experts.
COMMUNICATION_SHARE = 0.69
# The same section: padding is 88 % of the bytes early in training, and 98 % later.
PADDING_SHARE = (0.88, 0.98)
# The same section: shares of the most popular expert, and of the first five; Zipf exponents 0.75 and 0.87 give them. We take one between.
TOP_EXPERT_SHARE, TOP_FIVE_SHARE = 0.13, 0.40
ZIPF_EXPONENT = 0.8
# Table III: share of selections whose expert is on the token's own rank, by the most replicas that an expert may have.
LOCAL_SHARE_BY_REPLICAS = {0: 0.0328, 3: 0.1200, 7: 0.2151, 15: 0.3885, 31: 0.6132}
# Which of them Table II used is not known to us. We take the middle one of those that matter; README.md prints what the others give.
REPLICAS = 15
