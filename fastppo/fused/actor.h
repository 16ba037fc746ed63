// Acting for multi-layer perceptrons: core.acting.act, of parameters that are packed once for many calls.
#pragma once

#include "loss.h"
#include "team.h"

namespace fastppo {

struct ActCall {  // as in operators.py
  const float *obs, *obs_mean, *obs_scale;  // (S, N, D); (S, D) or null
  const uint8_t* action_mask;               // (S, N, logits), or null
  const float* noise;                       // (S, N, A)
  void* action;                             // (S, N, choices) int64, or (S, N, choices + components) float
  int64_t num_rows, num_threads;            // N
};

class Actor {
 public:
  explicit Actor(const NetworkShape& shape) : network_(shape) {}

  // Of one seed: its parameters, then what transpose_heads makes of them.
  int64_t packed_size() const { return network_.size + network_.turned_size; }

  int64_t num_columns() const { return network_.num_action_columns(); }
  bool is_discrete() const { return network_.num_normal() == 0; }

  // params: (S, P). packed: (S, packed_size), zero where nothing is written.
  void pack(const float* params, int64_t num_seeds, float* packed) const {
    for (int64_t seed = 0; seed < num_seeds; ++seed, packed += packed_size()) {
      network_.pack(params + seed * network_.flat_size, packed);
      network_.transpose_heads(packed, packed + network_.size);
    }
  }

  void act(const ActCall& call, const float* packed, int64_t num_seeds) {
    while (static_cast<int64_t>(blocks_.size()) < call.num_threads) {
      blocks_.emplace_back(network_);
      legal_.emplace_back(network_.num_logits);
    }
    const int64_t blocks_per_seed = (call.num_rows + kBlockRows - 1) / kBlockRows, num_blocks = num_seeds * blocks_per_seed;
    run_team(call.num_threads, [&](int64_t thread) {
      for (int64_t block = thread; block < num_blocks; block += call.num_threads) {
        const int64_t first = block % blocks_per_seed * kBlockRows;
        const int64_t seed = block / blocks_per_seed;
        act(call, packed + seed * packed_size(), thread, seed, first, std::min(kBlockRows, call.num_rows - first));
      }
    });
  }

 private:
  // core.acting.act of n rows of one seed.
  void act(const ActCall& call, const float* packed, int64_t thread, int64_t seed, int64_t first, int64_t n) const {
    const Block& block = blocks_[thread];
    const Columns& legal = legal_[thread];
    const int64_t inputs = network_.obs_size, logits = network_.num_logits;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = seed * call.num_rows + first + i;
      float* x = block.obs.row(i);
      std::memcpy(x, call.obs + row * inputs, inputs * sizeof(float));
      if (!call.obs_mean) continue;
      const float *mean = call.obs_mean + seed * inputs, *scale = call.obs_scale + seed * inputs;
      for (int64_t d = 0; d < inputs; ++d) x[d] = minimum(maximum((x[d] - mean[d]) * scale[d], -10.0f), 10.0f);
    }
    forward_trunk(network_, packed, n, block, 0);
    apply_head(block.features(0), n, network_.actor_head, packed, packed + network_.size, block.actor);
    for (int64_t i = 0; call.action_mask && i < n; ++i) {
      read_mask(call.action_mask + (seed * call.num_rows + first + i) * logits, logits, i, legal);
    }
    for (int64_t r = 0; call.action_mask && r < n; r += kWidth) mask_logits(network_.choices, legal, r, block.actor);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = seed * call.num_rows + first + i;
      network_.num_normal() > 0 ? sample<float>(call, packed, row, block.actor, i) : sample<int64_t>(call, packed, row, block.actor, i);
    }
  }

  // distributions.categorical_sample of each choice, then normal_sample, of row i of the block. out: logits, then means.
  template <class Number>
  void sample(const ActCall& call, const float* packed, int64_t row, const Columns& out, int64_t i) const {
    const float *noise = call.noise + row * network_.action_size, *log_std = packed + network_.log_std;
    Number* action = static_cast<Number*>(call.action) + row * network_.num_action_columns();
    int64_t first = 0;
    for (const int64_t number : network_.choices) {
      int64_t best = first;
      for (int64_t a = first + 1; a < first + number; ++a) {
        const float gain = out.column(a)[i] + noise[a], most = out.column(best)[i] + noise[best];
        if (gain > most || (std::isnan(gain) && !std::isnan(most))) best = a;
      }
      *action++ = static_cast<Number>(best - first);
      first += number;
    }
    for (int64_t a = first; a < network_.action_size; ++a) {
      *action++ = static_cast<Number>(out.column(a)[i] + std::exp(log_std[a - first]) * noise[a]);
    }
  }

  const Network network_;
  std::vector<Block> blocks_;  // of each thread
  std::vector<Columns> legal_;
};

}  // namespace fastppo
