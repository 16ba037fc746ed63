// The functions that operators.py calls: PPO's update and acting, for multi-layer perceptrons on the CPU.
//
// From the bottom: vector.h (one register), product.h (matrices), network.h (forward and backward), loss.h (a row's loss),
// targets.h (a rollout's values and advantages), update.h (epochs of minibatches). Knows nothing of Python or PyTorch.

#include "update.h"

namespace fastppo {

struct ActCall {  // as in operators.py
  const float *obs, *obs_mean, *obs_scale;  // (S, N, D); (S, D) or null
  const uint8_t* action_mask;               // (S, N, A), or null
  const float* noise;                       // (S, N, A)
  void* action;                             // (S, N, choices) int64, or (S, N, A) float
  int64_t num_rows, num_threads;            // N
};

// The actors of S seeds, with parameters packed once for many calls.
class Actors {
 public:
  Actors(const NetworkShape& shape, int64_t num_seeds) : network_(shape), num_seeds_(num_seeds), packed_(num_seeds * network_.size) {}

  void set(const float* params) {
    for (int64_t seed = 0; seed < num_seeds_; ++seed) {
      network_.pack(params + seed * network_.flat_size, packed_.get() + seed * network_.size);
    }
  }

  void act(const ActCall& call) {
    while (static_cast<int64_t>(blocks_.size()) < call.num_threads) blocks_.emplace_back(network_);
    const int64_t blocks_per_seed = (call.num_rows + kBlockRows - 1) / kBlockRows, num_blocks = num_seeds_ * blocks_per_seed;
    run_team(call.num_threads, [&](int64_t thread) {
      for (int64_t block = thread; block < num_blocks; block += call.num_threads) {
        const int64_t first = block % blocks_per_seed * kBlockRows;
        act(call, blocks_[thread], block / blocks_per_seed, first, std::min(kBlockRows, call.num_rows - first));
      }
    });
  }

 private:
  // core.acting.act of n rows of one seed.
  void act(const ActCall& call, const Block& block, int64_t seed, int64_t first, int64_t n) const {
    const int64_t inputs = network_.obs_size, outputs = network_.action_size;
    const float* packed = packed_.get() + seed * network_.size;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = seed * call.num_rows + first + i;
      float* x = block.obs.row(i);
      std::memcpy(x, call.obs + row * inputs, inputs * sizeof(float));
      if (!call.obs_mean) continue;
      const float *mean = call.obs_mean + seed * inputs, *scale = call.obs_scale + seed * inputs;
      for (int64_t d = 0; d < inputs; ++d) x[d] = minimum(maximum((x[d] - mean[d]) * scale[d], -10.0f), 10.0f);
    }
    forward_trunk(network_, packed, n, block, 0);
    apply(block.features(0), n, network_.actor_head, packed, block.actor);
    std::vector<uint8_t> kept(call.action_mask ? outputs : 0);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = seed * call.num_rows + first + i;
      if (call.action_mask) mask_logits(network_.choices, call.action_mask + row * outputs, block.actor.row(i), kept.data());
      sample(call, packed, row, call.noise + row * outputs, block.actor.row(i));
    }
  }

  // distributions.normal_sample, or categorical_sample of each choice. out: means or logits.
  void sample(const ActCall& call, const float* packed, int64_t row, const float* noise, float* out) const {
    const int64_t size = network_.action_size;
    if (network_.is_gaussian()) {
      const float* log_std = packed + network_.log_std;
      float* action = static_cast<float*>(call.action) + row * size;
      for (int64_t a = 0; a < size; ++a) action[a] = out[a] + std::exp(log_std[a]) * noise[a];
      return;
    }
    int64_t* action = static_cast<int64_t*>(call.action) + row * static_cast<int64_t>(network_.choices.size());
    for (const int64_t number : network_.choices) {
      int64_t best = 0;
      for (int64_t a = 1; a < number; ++a) {
        const float gain = out[a] + noise[a], most = out[best] + noise[best];
        if (gain > most || (std::isnan(gain) && !std::isnan(most))) best = a;
      }
      *action++ = best;
      out += number;
      noise += number;
    }
  }

  const Network network_;
  const int64_t num_seeds_;
  Floats packed_;
  std::vector<Block> blocks_;
};

}  // namespace fastppo

extern "C" {

// The digest of the files that this library was built from: sources.py.
const char* fastppo_sources() { return FASTPPO_SOURCES; }

// Not 0: an exchange with other processes has failed.
int32_t fastppo_learn(const fastppo::LearnCall* call) { return fastppo::Update(*call).run(); }

fastppo::Actors* fastppo_new_actors(const fastppo::NetworkShape* shape, int64_t num_seeds) {
  return new fastppo::Actors(*shape, num_seeds);
}
void fastppo_delete_actors(fastppo::Actors* actors) { delete actors; }
void fastppo_set_actors(fastppo::Actors* actors, const float* params) { actors->set(params); }
void fastppo_act(fastppo::Actors* actors, const fastppo::ActCall* call) { actors->act(*call); }
}
