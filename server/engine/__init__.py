"""The batching engine: requests in, tokens out, one packed forward pass a step.

request          plain data that crosses to and from the engine
config           sizes and limits
blocks           block accounting                                (pure)
sequence         one sequence and its life                       (pure)
adapter_slots    which adapter is where                          (pure)
scheduler        what the next step computes                     (pure)
kv_cache         the block tensors
attention        `attend`, and how a transformers model comes to call it
block_copies     blocks gathered for it
decode_kernel    the CPU's fast path for single-token rows
tile_attention   its fast path for prompts, on matrix tiles
prefix_attention and for single tokens over a long prefix of their adapter
tile_loops       what these two are made of
layer_kernels    its fast path for RMSNorm, gated SiLU and rotation
layers           what such a layer is made of
layer_stack      the layers of Llama and its relatives, made of those
step_program     a step of up to 128 tokens through them in one call
vector_loops     the kernels' inner loops
vector_ops       what those are made of
openmp           torch's own threads
packed_linear    bf16 weights packed for the CPU
tile_product     the CPU's fast path for few rows of those
tiles            the processor's matrix tiles
scales           IA3's tables and the hooks that apply them
model_runner     a planned step -> logits
self_check       can this base be served?
sampler          logits -> tokens
sampling_kernels the CPU's fast path for draws and log-probabilities
grammar_check    can this grammar be compiled? asked in a process that may be lost
grammar_compiler a grammar -> its compiled form, off the engine's thread
grammar          who waits for a grammar, and what each output may say next
loader           stored bytes -> serving forms, off the engine's thread
engine           schedule -> run -> sample -> commit
process, process_handle
                 the engine in a process of its own, from inside and from its parent
errors, client   its asyncio side, which starts it again when it is lost
offline          the engine from Python, without HTTP

Times in these files are of the default base in bfloat16 with two threads on two cores of a Xeon with AMX,
where nothing else is said, and of the day they were written: they say why something is as it is. What
holds today is measured by `make bench`.
"""
