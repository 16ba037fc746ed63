// What a rollout is learned towards, and what the minibatches need of it: the first half of core.ppo.learn.
#pragma once

#include <atomic>
#include <utility>

#include "loss.h"

namespace fastppo {

constexpr int64_t kNumMetrics = 8;  // core.ppo.MINIBATCH_METRICS

using Exchange = int32_t(float* data, int64_t size);  // data becomes its sum over processes; not 0: it has failed

struct LearnCall {  // as in operators.py; every field has 8 bytes
  NetworkShape network;
  const float *params, *exp_avg, *exp_avg_sq, *step;       // (P,) each, and ()
  const float *obs, *final_obs;                            // (T+1, N, D), normalised; final_obs may be null
  const uint8_t* action_mask;                              // (T+1, N, logits), or null
  const void* action;                                      // (T+1, N, choices) int64, or (T+1, N, choices + components) float
  const float* reward;                                     // (T+1, N)
  const uint8_t *terminated, *truncated, *valid;           // (T+1, N)
  const int64_t* permutation;                              // (E, B)
  const float *learning_rate, *clip_coef, *ent_coef, *vf_coef, *gamma, *gae_lambda, *max_grad_norm, *target_kl, *adam_eps;  // ()
  const float *reward_scale, *return_mean, *return_std;    // (); reward_scale may be null
  float *new_params, *new_exp_avg, *new_exp_avg_sq, *new_step;
  float *minibatch_metrics, *explained_variance, *new_return_mean, *new_return_std, *summary;
  int64_t num_steps, num_envs, num_epochs, num_minibatches, minibatch_size;
  int64_t monte_carlo, norm_returns, norm_adv, clip_reward, clip_vloss, recompute_advantage;
  int64_t num_parts, num_threads, rank, num_ranks;
  Exchange* exchange;  // null with one rank
};

struct Part {  // what one part of the rows has for itself
  explicit Part(const Network& network)
      : block(network), gradient(network.size), turned(network.turned_size), action(network.num_action_columns()),
        legal(network.num_logits), d_actor(network.action_size), entropies(network.choices.size()), target(kTargetSize) {}
  Block block;
  Floats gradient, turned;
  Columns action, legal, d_actor, entropies, target;  // of the block's rows
  LossSums sums;
  double squares = 0.0;  // of this part's stretch of the whole gradient
};

struct Statistics {  // of a minibatch
  double num_transitions = 0.0;
  float advantage_mean = 0.0f, advantage_scale = 1.0f;
};

class Targets {
 public:
  explicit Targets(const LearnCall& call)
      : call_(call), network_(call.network), num_rows_(call.num_steps * call.num_envs), params_(network_.size),
        values_(num_rows_ + call.num_envs), next_values_(num_rows_), targets_(num_rows_), statistics_(call.num_minibatches),
        return_mean_(*call.return_mean), return_std_(*call.return_std) {
    for (int64_t part = 0; part < call.num_parts; ++part) parts_.emplace_back(network_);
    network_.pack(call.params, params_.get());
  }

 protected:
  // This part's share of n items: [first, second).
  std::pair<int64_t, int64_t> share_of(int64_t part, int64_t n) const {
    return {n * part / call_.num_parts, n * (part + 1) / call_.num_parts};
  }

  // forward.evaluate_rollout: log pi(a|s), in the first epoch, V(s) and V(s') of this part's rows.
  void evaluate_rollout(int64_t number, bool is_first_epoch) {
    const auto [first, last] = share_of(number, num_rows_ + call_.num_envs);  // rows of step T have a value only
    Part& part = parts_[number];
    network_.transpose_heads(params_.get(), part.turned.get());
    std::vector<int64_t> rows, ended;
    for (int64_t from = first; from < last; from += kBlockRows) {
      rows.clear();
      for (int64_t row = from; row < std::min(from + kBlockRows, last); ++row) rows.push_back(row);
      const auto n = static_cast<int64_t>(rows.size());
      forward_rows(part, call_.obs, rows.data(), n);
      for (int64_t i = 0; i < n; ++i) {
        values_[rows[i]] = part.block.critic.column(0)[i];
        if (rows[i] < num_rows_ && has_final(rows[i])) ended.push_back(rows[i]);
      }
      if (!is_first_epoch) continue;
      read_actions(part, rows.data(), n);
      for (int64_t r = 0; r < n; r += kWidth) {
        const Vector log_prob = distribution(part, r).log_prob;
        for (int64_t i = r; i < std::min(r + kWidth, n) && rows[i] < num_rows_; ++i) targets_[rows[i]].old_log_prob = log_prob[i - r];
      }
    }
    for (size_t from = 0; from < ended.size(); from += kBlockRows) {
      const auto n = std::min<int64_t>(kBlockRows, static_cast<int64_t>(ended.size() - from));
      forward_rows(part, call_.final_obs, ended.data() + from, n);
      for (int64_t i = 0; i < n; ++i) next_values_[ended[from + i]] = part.block.critic.column(0)[i];
    }
  }

  bool has_final(int64_t row) const { return call_.final_obs && (call_.terminated[row] || call_.truncated[row]); }

  void forward_rows(Part& part, const float* obs, const int64_t* rows, int64_t n) {
    const int64_t size = network_.obs_size;
    for (int64_t i = 0; i < n; ++i) std::memcpy(part.block.obs.row(i), obs + rows[i] * size, size * sizeof(float));
    forward(network_, params_.get(), part.turned.get(), n, part.block);
  }

  // Actions, and which are legal, of n rows of the rollout; the last row also fills what is left of a register.
  void read_actions(Part& part, const int64_t* rows, int64_t n) {
    const int64_t size = network_.num_logits, columns = network_.num_action_columns();
    const bool is_float = network_.num_normal() > 0;
    for (int64_t i = 0; i < padded(n); ++i) {
      const int64_t row = rows[std::min(i, n - 1)];
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t place = row * columns + c;
        part.action.column(c)[i] = is_float ? static_cast<const float*>(call_.action)[place]
                                            : static_cast<float>(static_cast<const int64_t*>(call_.action)[place]);
      }
      if (call_.action_mask) read_mask(call_.action_mask + row * size, size, i, part.legal);
    }
  }

  // Log-probability and entropy of kWidth rows of the block.
  Outcome distribution(Part& part, int64_t r) {
    const Columns& out = part.block.actor;
    if (call_.action_mask) mask_logits(network_.choices, part.legal, r, out);
    const Outcome chosen = categorical(network_.choices, part.action, r, out, part.entropies);
    const Outcome components = normal(network_, part.action, r, params_.get() + network_.log_std, out);
    return {chosen.log_prob + components.log_prob, chosen.entropy + components.entropy};
  }

  // ppo.estimate_advantages, for all rows.
  void estimate_advantages() {
    const int64_t num_steps = call_.num_steps, num_envs = call_.num_envs;
    for (int64_t row = 0; row < num_rows_; ++row) {
      if (!has_final(row)) next_values_[row] = values_[row + num_envs];
      targets_[row].old_value = values_[row];
      targets_[row].valid = call_.valid[row] ? 1.0f : 0.0f;
    }
    const float gamma = *call_.gamma, decay = gamma * *call_.gae_lambda;
    std::vector<float> later(num_envs, 0.0f);  // of step t + 1
    for (int64_t t = num_steps - 1; t >= 0; --t) {
      for (int64_t env = 0; env < num_envs; ++env) {
        const int64_t row = t * num_envs + env;
        const bool terminated = call_.terminated[row], truncated = call_.truncated[row];
        const float goes_on = terminated || truncated ? 0.0f : 1.0f, reward = scaled_reward(call_.reward[row]);
        const float value = values_[row] * return_std_ + return_mean_, bootstrap = next_values_[row] * return_std_ + return_mean_;
        Target& target = targets_[row];
        if (call_.monte_carlo) {  // advantages.monte_carlo_return
          later[env] = reward + gamma * bootstrap * (truncated && !terminated ? 1.0f : 0.0f) + gamma * goes_on * later[env];
          target.value_target = later[env];
        } else {  // advantages.generalized_advantage
          const float delta = reward + gamma * bootstrap * (terminated ? 0.0f : 1.0f) - value;
          later[env] = delta + decay * goes_on * later[env];
          target.advantage = later[env];
          target.value_target = later[env] + value;
        }
      }
    }
    if (call_.norm_returns) standardize_returns();
    if (!call_.monte_carlo) return;
    for (int64_t row = 0; row < num_rows_; ++row) targets_[row].advantage = targets_[row].value_target - values_[row];
  }

  float scaled_reward(float reward) const {
    if (call_.clip_reward) reward = static_cast<float>((reward > 0.0f) - (reward < 0.0f));
    if (call_.reward_scale) reward = minimum(maximum(reward * *call_.reward_scale, -10.0f), 10.0f);
    return reward;
  }

  void standardize_returns() {
    const auto [mean, std] = mean_and_std([](const Target& row) { return row.value_target; });
    return_mean_ = static_cast<float>(mean);
    return_std_ = static_cast<float>(std);
    for (Target& target : targets_) target.value_target = (target.value_target - return_mean_) / (return_std_ + 1e-8f);
  }

  // value_std: the unit of the values; that of the targets is return_std_.
  void explained_variance(float value_std) {
    const auto target = [this](const Target& row) { return row.value_target * return_std_; };
    const auto error = [&](const Target& row) { return target(row) - row.old_value * value_std; };
    const double error_std = mean_and_std(error).second, target_std = mean_and_std(target).second;
    const double ratio = error_std / target_std;
    *call_.explained_variance = target_std > 0.0 ? static_cast<float>(1.0 - ratio * ratio) : NAN;
  }

  // losses.mean_and_std of a variable of the rows, over the valid ones of all processes.
  template <class Variable>
  std::pair<double, double> mean_and_std(Variable variable) {
    double sums[2] = {0.0, 0.0}, squares = 0.0;
    for (const Target& row : targets_) {
      sums[0] += row.valid;
      sums[1] += static_cast<double>(variable(row)) * row.valid;
    }
    total(sums, 2);
    const double mean = sums[1] / std::max(sums[0], 1.0);
    for (const Target& row : targets_) {
      const double error = variable(row) - mean;
      squares += error * error * row.valid;
    }
    total(&squares, 1);
    return {mean, std::sqrt(squares / std::max(sums[0] - 1.0, 1.0))};
  }

  // losses.Total: the sums over all processes, in place.
  void total(double* sums, int64_t n) {
    if (call_.num_ranks == 1 || failed_) return;
    std::vector<float> floats(sums, sums + n);
    failed_ = failed_ || call_.exchange(floats.data(), n) != 0;
    std::copy(floats.begin(), floats.end(), sums);
  }

  // ppo.make_minibatches: transitions, and what standardises advantages, of every stride-th minibatch from first to last.
  void minibatch_statistics(int64_t first, int64_t last, int64_t stride) {
    const int64_t n = call_.num_minibatches;
    std::vector<double> sums(2 * n, 0.0), squares(n, 0.0);
    for (int64_t l = first; l < last; l += stride) {
      for_minibatch(l, [&](const Target& row) {
        sums[2 * l] += row.valid;
        sums[2 * l + 1] += static_cast<double>(row.advantage) * row.valid;
      });
    }
    total(sums.data(), 2 * n);
    for (int64_t l = first; l < last; l += stride) {
      const double mean = sums[2 * l + 1] / std::max(sums[2 * l], 1.0);
      statistics_[l].num_transitions = sums[2 * l];
      if (!call_.norm_adv) continue;
      statistics_[l].advantage_mean = static_cast<float>(mean);
      for_minibatch(l, [&](const Target& row) { squares[l] += (row.advantage - mean) * (row.advantage - mean) * row.valid; });
    }
    if (!call_.norm_adv) return;
    total(squares.data(), n);
    for (int64_t l = first; l < last; l += stride) {
      const double std = std::sqrt(squares[l] / std::max(sums[2 * l] - 1.0, 1.0));
      statistics_[l].advantage_scale = 1.0f / (static_cast<float>(std) + 1e-8f);
    }
  }

  template <class Body>
  void for_minibatch(int64_t l, Body body) {
    const int64_t* index = call_.permutation + l * call_.minibatch_size;
    for (int64_t i = 0; i < call_.minibatch_size; ++i) body(targets_[index[i]]);
  }

  const LearnCall& call_;
  const Network network_;
  const int64_t num_rows_;  // B = T * N
  Floats params_;           // packed
  std::vector<float> values_, next_values_;  // (T+1, N), (T, N)
  std::vector<Target> targets_;              // (T, N)
  std::vector<Statistics> statistics_;       // (L,)
  std::vector<Part> parts_;
  float return_mean_, return_std_;           // the critic's units; after an epoch, those of its targets
  std::atomic<bool> failed_{false};  // an exchange with other processes
};

}  // namespace fastppo
