"""nanor1: how language models are taught to reason.

The method is on this floor: model, attention, kernels, packing, gradient, logprobs, sampler, slots, next_token, judge,
grpo, optim, training; README.md says in which order to read them. Around it: tokenizer, weights, rewards, options, chat
and miniature, and the rooms tasks, grading, sandbox (judging), stages (R1's other stages), search (inference-time
scaling), evaluation and run (what keeps a run).

Names end in the letters of their shape, first axis first (`logp_M`, `cu_seqlens_B1`: B + 1 entries):

    P problems          G completions a problem     B sequences, or rows    S slots of the cache
    N packed tokens     M tokens with a loss        J keys of the N queries, copies of shared prompts included
    T positions         R tokens of shared prompts  V vocabulary            C width
    H query heads       K key/value heads           D head width
"""
