// The C interface: sizes, open and close, and one launcher for each half of an operation. Everything goes onto `stream`; nothing allocates,
// waits or synchronises. Launchers return the CUDA error code, 0 for success. Arguments are checked by the caller (ops/transports/cuda.py).
//
// Codes of dtypes: 0 fp32, 1 bf16, 2 fp16. Rows and their starts are multiples of 16 bytes; items of probs have 2, 4 or 8.
#pragma once

#include "portable.h"

#define SCALEMOE_API extern "C" __attribute__((visibility("default")))

SCALEMOE_API int64_t scalemoe_cuda_state_bytes();

SCALEMOE_API int64_t scalemoe_cuda_map_items(int64_t num_ranks, int64_t max_tokens, int64_t experts_per_token, int64_t num_local);

SCALEMOE_API int64_t scalemoe_cuda_buffer_bytes(int32_t num_ranks, int32_t max_tokens, int32_t max_experts, int64_t max_row_bytes);

// buffers: each rank's symmetric buffer as mapped here, zeroed before any rank's first operation. state: zeroed device memory of this rank
// alone. failure: four zeroed uint32 that host and device can both reach. Returns a handle, or null when memory is short.
SCALEMOE_API void* scalemoe_cuda_open(int32_t num_ranks, int32_t rank, int32_t max_tokens, int32_t max_experts, int64_t max_row_bytes,
                                      int32_t num_blocks, int64_t timeout_ns, void* const* buffers, void* state, void* failure);

SCALEMOE_API void scalemoe_cuda_close(void* handle);

// prob_bytes 0: rows only, for receivers that have the map of an earlier dispatch.
SCALEMOE_API int scalemoe_cuda_dispatch_push(const void* handle, const void* x, const int32_t* experts, const void* probs,
                                             int32_t num_tokens, int32_t experts_per_token, int32_t num_local, int32_t row_bytes,
                                             int32_t prob_bytes, cudaStream_t stream);

// Waits for all sources, builds the map and takes the rows to their experts.
SCALEMOE_API int scalemoe_cuda_dispatch_receive(const void* handle, int32_t experts_per_token, int32_t num_local, int32_t row_bytes,
                                                int32_t prob_bytes, int32_t row_capacity, int32_t alignment, void* rows, void* row_probs,
                                                int64_t* tokens_per_expert, int32_t* map_items, cudaStream_t stream);

// Rows only, into the rows that an earlier dispatch's map has.
SCALEMOE_API int scalemoe_cuda_rows_receive(const void* handle, int32_t experts_per_token, int32_t num_local, int32_t row_bytes,
                                            int32_t num_rows, void* rows, int32_t* map_items, cudaStream_t stream);

// prob_bytes 0: rows only.
SCALEMOE_API int scalemoe_cuda_combine_push(const void* handle, const void* rows, const void* row_probs, int32_t* map_items,
                                            int32_t num_rows, int32_t experts_per_token, int32_t num_local, int32_t row_bytes,
                                            int32_t prob_bytes, int32_t dtype, cudaStream_t stream);

// prob_bytes 0: rows only, as in the push.
SCALEMOE_API int scalemoe_cuda_combine_receive(const void* handle, const int32_t* experts, int32_t num_tokens, int32_t experts_per_token,
                                               int32_t num_local, int32_t row_bytes, int32_t prob_bytes, int32_t dtype, void* y,
                                               void* probs, cudaStream_t stream);

// counts: `bytes` of any type; gathered: [G, bytes].
SCALEMOE_API int scalemoe_cuda_gather_counts(const void* handle, const void* counts, int32_t bytes, void* gathered, cudaStream_t stream);
