// The launchers of launchers.h.

#include <new>

#include "build_map.h"
#include "launchers.h"
#include "local.h"

using namespace scalemoe;

namespace {

enum Dtype : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

// A warp for each of `items`, as far as blocks that all run at once allow.
unsigned local_blocks(int64_t items) {
  const int64_t blocks = (items + kLocalThreads / kWarp - 1) / (kLocalThreads / kWarp);
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMaxLocalBlocks ? kMaxLocalBlocks : blocks);
}

const Exchange& exchange_of(const void* handle) { return *static_cast<const Exchange*>(handle); }

RowMap map_of(const Exchange& ex, int32_t* map, int32_t num_local) { return row_map_in(map, ex.num_ranks, num_local); }

template <class Row>
void launch_reduce(const Exchange& ex, const Announcement& call, const RowMap& map, int32_t num_rows, const Word* rows,
                   const char* row_probs, cudaStream_t stream) {
  SCALEMOE_LAUNCH(ex.num_blocks, kPushThreads, stream, reduce_push<Row>, ex, call, map, num_rows, rows, row_probs);
}

template <class Row>
void launch_restore(const Exchange& ex, const Announcement& call, const int32_t* experts, Word* y, char* probs, cudaStream_t stream) {
  SCALEMOE_LAUNCH(local_blocks(call.num_tokens), kLocalThreads, stream, restore<Row>, ex, call, experts, y, probs);
}

}  // namespace

int64_t scalemoe_cuda_state_bytes() { return sizeof(State); }

int64_t scalemoe_cuda_map_items(int64_t num_ranks, int64_t max_tokens, int64_t experts_per_token, int64_t num_local) {
  return row_map_items(num_ranks, max_tokens, experts_per_token, num_local);
}

int64_t scalemoe_cuda_buffer_bytes(int32_t num_ranks, int32_t max_tokens, int32_t max_experts, int64_t max_row_bytes) {
  Exchange ex{};
  ex.num_ranks = num_ranks, ex.max_tokens = max_tokens, ex.max_experts = max_experts, ex.max_row_bytes = max_row_bytes;
  lay_out(ex);
  return buffer_bytes(ex);
}

void* scalemoe_cuda_open(int32_t num_ranks, int32_t rank, int32_t max_tokens, int32_t max_experts, int64_t max_row_bytes,
                         int32_t num_blocks, int64_t timeout_ns, void* const* buffers, void* state, void* failure) {
  Exchange* ex = new (std::nothrow) Exchange{};
  if (ex == nullptr) return nullptr;
  ex->num_ranks = num_ranks, ex->rank = rank, ex->max_tokens = max_tokens, ex->max_experts = max_experts, ex->num_blocks = num_blocks;
  ex->max_row_bytes = max_row_bytes;
  ex->timeout_ns = static_cast<uint64_t>(timeout_ns);
  ex->state = static_cast<State*>(state);
  ex->failure = static_cast<Failure*>(failure);
  for (int g = 0; g < num_ranks; ++g) ex->buffers[g] = static_cast<char*>(buffers[g]);
  lay_out(*ex);
  return ex;
}

void scalemoe_cuda_close(void* handle) { delete static_cast<Exchange*>(handle); }

int scalemoe_cuda_dispatch_push(const void* handle, const void* x, const int32_t* experts, const void* probs, int32_t num_tokens,
                                int32_t experts_per_token, int32_t num_local, int32_t row_bytes, int32_t prob_bytes,
                                cudaStream_t stream) {
  const Exchange& ex = exchange_of(handle);
  const Operation operation = prob_bytes != 0 ? kDispatch : kCombineBackward;
  const Announcement call{operation, num_tokens, experts_per_token, num_local, row_bytes, prob_bytes};
  SCALEMOE_LAUNCH(ex.num_blocks, kPushThreads, stream, dispatch_push, ex, call, static_cast<const Word*>(x), experts,
                  static_cast<const char*>(probs));
  return cudaGetLastError();
}

int scalemoe_cuda_dispatch_receive(const void* handle, int32_t experts_per_token, int32_t num_local, int32_t row_bytes,
                                   int32_t prob_bytes, int32_t row_capacity, int32_t alignment, void* rows, void* row_probs,
                                   int64_t* tokens_per_expert, int32_t* map_items, cudaStream_t stream) {
  const Exchange& ex = exchange_of(handle);
  const Announcement call{kDispatch, 0, experts_per_token, num_local, row_bytes, prob_bytes};
  const RowMap map = map_of(ex, map_items, num_local);
  SCALEMOE_LAUNCH(1, kWarp, stream, wait_peers, ex, call);
  SCALEMOE_LAUNCH(ex.num_ranks, kMapThreads, stream, count_rows, ex, call, map);
  SCALEMOE_LAUNCH(num_local * ex.num_ranks, kMapThreads, stream, place_rows, ex, call, map, row_capacity, alignment, tokens_per_expert);
  SCALEMOE_LAUNCH(local_blocks(int64_t{ex.num_ranks} * ex.max_tokens), kLocalThreads, stream, expand, ex, call, map,
                  row_capacity, static_cast<Word*>(rows), static_cast<char*>(row_probs));
  return cudaGetLastError();
}

int scalemoe_cuda_rows_receive(const void* handle, int32_t experts_per_token, int32_t num_local, int32_t row_bytes, int32_t num_rows,
                               void* rows, int32_t* map_items, cudaStream_t stream) {
  const Exchange& ex = exchange_of(handle);
  const Announcement call{kCombineBackward, 0, experts_per_token, num_local, row_bytes, 0};
  const RowMap map = map_of(ex, map_items, num_local);
  SCALEMOE_LAUNCH(1, kWarp, stream, wait_peers, ex, call);
  SCALEMOE_LAUNCH(local_blocks(int64_t{ex.num_ranks} * ex.max_tokens), kLocalThreads, stream, expand, ex, call, map,
                  num_rows, static_cast<Word*>(rows), static_cast<char*>(nullptr));
  return cudaGetLastError();
}

int scalemoe_cuda_combine_push(const void* handle, const void* rows, const void* row_probs, int32_t* map_items, int32_t num_rows,
                               int32_t experts_per_token, int32_t num_local, int32_t row_bytes, int32_t prob_bytes, int32_t dtype,
                               cudaStream_t stream) {
  const Exchange& ex = exchange_of(handle);
  const Operation operation = prob_bytes != 0 ? kDispatchBackward : kCombine;
  const Announcement call{operation, 0, experts_per_token, num_local, row_bytes, prob_bytes};
  const auto launch = dtype == kFp32 ? launch_reduce<Fp32> : dtype == kBf16 ? launch_reduce<Bf16> : launch_reduce<Fp16>;
  launch(ex, call, map_of(ex, map_items, num_local), num_rows, static_cast<const Word*>(rows), static_cast<const char*>(row_probs), stream);
  return cudaGetLastError();
}

int scalemoe_cuda_combine_receive(const void* handle, const int32_t* experts, int32_t num_tokens, int32_t experts_per_token,
                                  int32_t num_local, int32_t row_bytes, int32_t prob_bytes, int32_t dtype, void* y, void* probs,
                                  cudaStream_t stream) {
  const Exchange& ex = exchange_of(handle);
  const Operation operation = prob_bytes != 0 ? kDispatchBackward : kCombine;
  const Announcement call{operation, num_tokens, experts_per_token, num_local, row_bytes, prob_bytes};
  const auto launch = dtype == kFp32 ? launch_restore<Fp32> : dtype == kBf16 ? launch_restore<Bf16> : launch_restore<Fp16>;
  SCALEMOE_LAUNCH(1, kWarp, stream, wait_peers, ex, call);
  launch(ex, call, experts, static_cast<Word*>(y), static_cast<char*>(probs), stream);
  return cudaGetLastError();
}

int scalemoe_cuda_gather_counts(const void* handle, const void* counts, int32_t bytes, void* gathered, cudaStream_t stream) {
  const Exchange& ex = exchange_of(handle);
  const Announcement call{kGatherCounts, 0, 0, 0, bytes, 0};
  SCALEMOE_LAUNCH(1, kPushThreads, stream, exchange_counts, ex, call, static_cast<const char*>(counts), static_cast<char*>(gathered));
  return cudaGetLastError();
}
