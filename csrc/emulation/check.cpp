// Exchanges between emulated ranks, compared bit by bit with a plain loop. `check CONFIGURATIONS SEED`: exit code 0 if all agree.
//
// All ranks launch all operations of all steps before anything runs, as on a GPU; only the kernels' flags synchronise them. Tests build it
// as it is, with ThreadSanitizer, and with planted mistakes.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../cuda/launchers.h"
#include "../cuda/layout.h"

extern "C" void scalemoe_emulated_defer(uint64_t seed);
extern "C" void scalemoe_emulated_run();

namespace {

constexpr int kSteps = 3;
constexpr uint64_t kTimeoutNs = 1'000'000'000;  // simulated: ten times what the largest configuration takes

uint32_t random_state = 1;
int random_below(int n) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<int>((random_state >> 8) % static_cast<uint32_t>(n));
}

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
// Zeroed memory of `count` items, aligned as device memory is.
template <class T>
struct Array {
  std::unique_ptr<T, AlignedFree> memory;
  size_t count;
  explicit Array(size_t n = 0) : count(n) {
    void* p = std::aligned_alloc(128, (n * sizeof(T) / 128 + 1) * 128);
    std::memset(p, 0, n * sizeof(T));
    memory.reset(static_cast<T*>(p));
  }
  T* data() const { return memory.get(); }
  T& operator[](size_t i) const { return memory.get()[i]; }
};

struct Configuration {
  int num_ranks, top_k, num_local, max_tokens, columns, alignment;
  bool is_bf16, overflows;
  uint32_t first_epoch;
  int item_bytes() const { return is_bf16 ? 2 : 4; }
  int row_bytes() const { return columns * item_bytes(); }
  int capacity() const { return num_ranks * max_tokens * (top_k < num_local ? top_k : num_local) + num_local * (alignment - 1); }
};

float widen(const Configuration& c, const char* row, int i) {
  uint32_t bits = 0;
  std::memcpy(&bits, row + i * c.item_bytes(), static_cast<size_t>(c.item_bytes()));
  if (c.is_bf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void narrow(const Configuration& c, float value, char* row, int i) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (c.is_bf16) bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  std::memcpy(row + i * c.item_bytes(), &bits, static_cast<size_t>(c.item_bytes()));
}

Array<char> random_rows(const Configuration& c, int rows) {
  Array<char> all(static_cast<size_t>(rows) * c.row_bytes());
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < c.columns; ++i) narrow(c, (random_below(20001) - 10000) / 3000.0f, all.data() + r * c.row_bytes(), i);
  }
  return all;
}

// Inputs and outputs of one rank in one step.
struct Step {
  int num_tokens;
  Array<char> x, grad_y, expert_out, grad_rows_in;
  Array<int32_t> experts, map;
  Array<float> probs, grad_row_probs;
  Array<int64_t> counts, gathered, tokens_per_expert;
  Array<char> rows, y, grad_rows, grad_x;
  Array<float> row_probs, grad_probs;
};

Step make_step(const Configuration& c, int rank) {
  Step s;
  s.num_tokens = rank == 0 ? c.max_tokens : random_below(4) == 0 ? 0 : random_below(c.max_tokens + 1);
  const int columns = c.num_ranks * c.num_local, pairs = s.num_tokens * c.top_k;
  const auto rows = static_cast<size_t>(c.capacity()) * c.row_bytes(), tokens = static_cast<size_t>(s.num_tokens) * c.row_bytes();
  s.x = random_rows(c, s.num_tokens), s.grad_y = random_rows(c, s.num_tokens);
  s.expert_out = random_rows(c, c.capacity()), s.grad_rows_in = random_rows(c, c.capacity());
  s.experts = Array<int32_t>(pairs), s.probs = Array<float>(pairs), s.grad_probs = Array<float>(pairs);
  s.grad_row_probs = Array<float>(c.capacity()), s.row_probs = Array<float>(c.capacity());
  s.counts = Array<int64_t>(columns), s.gathered = Array<int64_t>(columns * c.num_ranks), s.tokens_per_expert = Array<int64_t>(c.num_local);
  s.map = Array<int32_t>(scalemoe_cuda_map_items(c.num_ranks, c.max_tokens, c.top_k, c.num_local));
  s.rows = Array<char>(rows), s.grad_rows = Array<char>(rows), s.y = Array<char>(tokens), s.grad_x = Array<char>(tokens);
  std::memset(s.rows.data(), 0xee, rows), std::memset(s.grad_rows.data(), 0xee, rows);
  for (int t = 0; t < s.num_tokens; ++t) {
    int k = 0;
    for (int column = 0; column < columns && k < c.top_k; ++column) {
      if (random_below(columns) < c.top_k + 1) s.experts[t * c.top_k + k++] = column;
    }
    for (; k < c.top_k; ++k) s.experts[t * c.top_k + k] = -1;
  }
  for (int i = 0; i < pairs; ++i) s.probs[i] = s.experts[i] >= 0 ? static_cast<float>(random_below(1000)) / 1000 : 0;
  for (int i = 0; i < c.capacity(); ++i) s.grad_row_probs[i] = static_cast<float>(random_below(1000)) / 1000;
  for (int i = 0; i < columns; ++i) s.counts[i] = random_below(1000);
  return s;
}

void launch_step(const Configuration& c, void* handle, const Step& s, int capacity, void* stream) {
  const int dtype = c.is_bf16 ? 1 : 0, L = c.num_local, K = c.top_k, T = s.num_tokens, bytes = c.row_bytes();
  scalemoe_cuda_gather_counts(handle, s.counts.data(), static_cast<int>(s.counts.count * 8), s.gathered.data(), stream);
  scalemoe_cuda_dispatch_push(handle, s.x.data(), s.experts.data(), s.probs.data(), T, K, L, bytes, 4, stream);
  scalemoe_cuda_dispatch_receive(handle, K, L, bytes, 4, capacity, c.alignment, s.rows.data(), s.row_probs.data(),
                                 s.tokens_per_expert.data(), s.map.data(), stream);
  scalemoe_cuda_combine_push(handle, s.expert_out.data(), nullptr, s.map.data(), c.capacity(), K, L, bytes, 0, dtype, stream);
  scalemoe_cuda_combine_receive(handle, s.experts.data(), T, K, L, bytes, 0, dtype, s.y.data(), nullptr, stream);
  scalemoe_cuda_dispatch_push(handle, s.grad_y.data(), s.experts.data(), nullptr, T, K, L, bytes, 0, stream);
  scalemoe_cuda_rows_receive(handle, K, L, bytes, c.capacity(), s.grad_rows.data(), s.map.data(), stream);
  scalemoe_cuda_combine_push(handle, s.grad_rows_in.data(), s.grad_row_probs.data(), s.map.data(), c.capacity(), K, L, bytes, 4, dtype,
                             stream);
  scalemoe_cuda_combine_receive(handle, s.experts.data(), T, K, L, bytes, 4, dtype, s.grad_x.data(), s.grad_probs.data(), stream);
}

bool complain(const char* what, int rank, int index) {
  std::fprintf(stderr, "%s is wrong: rank %d, index %d\n", what, rank, index);
  return false;
}

bool differ(const Array<char>& rows, int row, const Array<char>& others, int other, int bytes) {
  return std::memcmp(rows.data() + row * bytes, others.data() + other * bytes, static_cast<size_t>(bytes)) != 0;
}

// What arrives at `rank`; fills row_of[s][t * K + k].
bool check_dispatch(const Configuration& c, const std::vector<Step>& ranks, int rank, std::vector<std::vector<int>>& row_of) {
  const Step& mine = ranks[rank];
  const int bytes = c.row_bytes();
  int row = 0;
  for (int e = 0; e < c.num_local; ++e) {
    const int first = row;
    for (int s = 0; s < c.num_ranks; ++s) {
      const Step& from = ranks[s];
      for (int i = 0; i < from.num_tokens * c.top_k; ++i) {
        if (from.experts[i] != rank * c.num_local + e) continue;
        const int t = i / c.top_k;
        row_of[s][i] = row;
        if (differ(mine.rows, row, from.x, t, bytes)) return complain("a row", rank, row);
        if (differ(mine.grad_rows, row, from.grad_y, t, bytes)) return complain("a row's gradient", rank, row);
        if (mine.row_probs[row] != from.probs[i]) return complain("a row's probability", rank, row);
        ++row;
      }
    }
    for (; (row - first) % c.alignment != 0; ++row) {
      for (int b = 0; b < bytes; ++b) {
        if (mine.rows[row * bytes + b] != 0 || mine.grad_rows[row * bytes + b] != 0) return complain("padding", rank, row);
      }
    }
    if (mine.tokens_per_expert[e] != row - first) return complain("a count of rows", rank, e);
  }
  return true;
}

// The sum over ranks of each rank's rounded sum of the token's rows.
bool check_sum(const Configuration& c, const std::vector<Step>& ranks, int rank, int t,
               const std::vector<std::vector<std::vector<int>>>& row_of, Array<char> Step::*rows, const char* result) {
  const Step& mine = ranks[rank];
  std::vector<char> partial(c.row_bytes()), expected(c.row_bytes());
  for (int i = 0; i < c.columns; ++i) {
    float sum = 0;
    for (int g = 0; g < c.num_ranks; ++g) {
      float here = 0;
      for (int k = t * c.top_k; k < (t + 1) * c.top_k; ++k) {
        if (mine.experts[k] / c.num_local == g && mine.experts[k] >= 0) {
          here += widen(c, (ranks[g].*rows).data() + row_of[g][rank][k] * c.row_bytes(), i);
        }
      }
      narrow(c, here, partial.data(), i);
      sum += widen(c, partial.data(), i);
    }
    narrow(c, sum, expected.data(), i);
  }
  return std::memcmp(result + t * c.row_bytes(), expected.data(), expected.size()) == 0;
}

bool check_step(const Configuration& c, const std::vector<Step>& ranks) {
  std::vector<std::vector<std::vector<int>>> row_of(c.num_ranks, std::vector<std::vector<int>>(c.num_ranks));
  for (int g = 0; g < c.num_ranks; ++g) {
    for (int s = 0; s < c.num_ranks; ++s) row_of[g][s].assign(ranks[s].num_tokens * c.top_k, -1);
    if (!check_dispatch(c, ranks, g, row_of[g])) return false;
  }
  for (int s = 0; s < c.num_ranks; ++s) {
    const Step& mine = ranks[s];
    const auto columns = mine.counts.count;
    for (size_t i = 0; i < columns * c.num_ranks; ++i) {
      if (mine.gathered[i] != ranks[i / columns].counts[i % columns]) return complain("a gathered count", s, static_cast<int>(i));
    }
    for (int t = 0; t < mine.num_tokens; ++t) {
      if (!check_sum(c, ranks, s, t, row_of, &Step::expert_out, mine.y.data())) return complain("y", s, t);
      if (!check_sum(c, ranks, s, t, row_of, &Step::grad_rows_in, mine.grad_x.data())) return complain("x's gradient", s, t);
    }
    for (int i = 0; i < mine.num_tokens * c.top_k; ++i) {
      const int g = mine.experts[i] / c.num_local;
      const float expected = mine.experts[i] >= 0 ? ranks[g].grad_row_probs[row_of[g][s][i]] : 0;
      if (mine.grad_probs[i] != expected) return complain("a probability's gradient", s, i);
    }
  }
  return true;
}

// One rank has too little room: it must say so, and no rank may train on what it gets.
bool check_overflow(const std::vector<Step>& ranks, const std::vector<Array<uint32_t>>& failures) {
  for (size_t g = 0; g < ranks.size(); ++g) {
    const uint32_t code = failures[g][0], culprits = failures[g][1];
    if (code != scalemoe::kTooManyRows || culprits != 1) return complain("the failure", static_cast<int>(g), static_cast<int>(code));
    for (int b = 0; b < static_cast<int>(ranks[g].grad_x.count); ++b) {
      if (ranks[g].grad_x[b] != static_cast<char>(0xff)) return complain("x's gradient after a failure", static_cast<int>(g), b);
    }
  }
  return true;
}

bool check_configuration(const Configuration& c, uint64_t seed) {
  std::vector<Array<char>> buffers;
  std::vector<Array<uint32_t>> states, failures;
  std::vector<void*> pointers, handles;
  for (int g = 0; g < c.num_ranks; ++g) {
    buffers.emplace_back(scalemoe_cuda_buffer_bytes(c.num_ranks, c.max_tokens, c.top_k, c.row_bytes()));
    pointers.push_back(buffers.back().data());
    states.emplace_back(scalemoe_cuda_state_bytes() / 4);
    failures.emplace_back(4);
    reinterpret_cast<scalemoe::State*>(states.back().data())->epoch = c.first_epoch;
    for (int s = 0; s < c.num_ranks; ++s) reinterpret_cast<scalemoe::FlagLine*>(buffers.back().data())[s].epoch = c.first_epoch;
  }
  std::vector<std::vector<Step>> steps(kSteps);
  for (auto& ranks : steps) {
    for (int g = 0; g < c.num_ranks; ++g) ranks.push_back(make_step(c, g));
  }
  // The last step, so that nothing but the failure is to be seen; rank 0's first token has at least one expert there.
  if (c.overflows) steps.back()[0].experts[0] = 0;
  scalemoe_emulated_defer(seed);
  for (int g = 0; g < c.num_ranks; ++g) {
    handles.push_back(scalemoe_cuda_open(c.num_ranks, g, c.max_tokens, c.top_k, c.row_bytes(), 2, kTimeoutNs, pointers.data(),
                                         states[g].data(), failures[g].data()));
    for (auto& ranks : steps) {
      const bool too_small = c.overflows && g == 0 && &ranks == &steps.back();
      launch_step(c, handles[g], ranks[g], too_small ? 0 : c.capacity(), handles[g]);
    }
  }
  scalemoe_emulated_run();
  for (void* handle : handles) scalemoe_cuda_close(handle);
  for (auto& ranks : steps) {
    const bool fails = c.overflows && &ranks == &steps.back();
    if (!(fails ? check_overflow(ranks, failures) : check_step(c, ranks))) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int configurations = argc > 1 ? std::atoi(argv[1]) : 20;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (int i = 0; i < configurations; ++i) {
    random_state = static_cast<uint32_t>(seed * 7919 + i);
    const int top_ks[] = {2, 4, 1};
    Configuration c{};
    c.num_ranks = 1 << (i % 3), c.top_k = top_ks[(i + i / 3) % 3], c.num_local = c.top_k == 4 ? 4 : 1 + random_below(4);
    c.max_tokens = i % 3 == 1 ? scalemoe::kMapThreads + 1 + random_below(20) : 1 + random_below(30);
    c.is_bf16 = i % 2 == 1, c.columns = random_below(5) == 0 ? 8 * 67 : 8 * (1 + random_below(12));
    c.alignment = random_below(2) == 1 ? 8 : 1, c.first_epoch = random_below(2) == 1 ? 0xfffffff8u : 0, c.overflows = i % 8 == 7;
    if (c.overflows) c.max_tokens = 1 + random_below(8);
    if (check_configuration(c, seed + i)) continue;
    std::fprintf(stderr,
                 "configuration %d of seed %llu: %d ranks, top %d of %d local, at most %d tokens, %d columns %s, alignment %d, "
                 "epochs from %u%s\n",
                 i, static_cast<unsigned long long>(seed), c.num_ranks, c.top_k, c.num_local, c.max_tokens, c.columns,
                 c.is_bf16 ? "bf16" : "fp32", c.alignment, c.first_epoch, c.overflows ? ", overflow" : "");
    return 1;
  }
  std::printf("%d configurations agree\n", configurations);
}
