// core.ppo.learn for a multi-layer perceptron: the same steps under the same names.
//
// Rows of a minibatch are cut into `num_parts` parts, each with its own sum of gradients, and the sums are added in their order. So
// the result depends on the number of parts and not on the number of threads that share them.
#pragma once

#include "targets.h"
#include "team.h"

namespace fastppo {

class Update : Targets {
 public:
  explicit Update(const LearnCall& call)
      : Targets(call), exp_avg_(network_.size), exp_avg_sq_(network_.size),
        flat_(network_.flat_size + kNumMetrics + call.num_ranks), barrier_(call.num_threads) {
    network_.pack(call.exp_avg, exp_avg_.get());
    network_.pack(call.exp_avg_sq, exp_avg_sq_.get());
    coefficients_ = {*call.clip_coef, *call.ent_coef, *call.vf_coef, call.clip_vloss != 0};
  }

  // 0, or 1 if an exchange with other processes has failed.
  int32_t run() {
    run_team(call_.num_threads, [this](int64_t thread) { work(thread); });
    if (failed_) return 1;
    network_.unpack(params_.get(), call_.new_params);
    network_.unpack(exp_avg_.get(), call_.new_exp_avg);
    network_.unpack(exp_avg_sq_.get(), call_.new_exp_avg_sq);
    *call_.new_return_mean = return_mean_;
    *call_.new_return_std = return_std_;
    summarize();
    return 0;
  }

 private:
  struct Progress {  // what minibatches hand on, beside the parameters; every thread has the same
    float step;      // of Adam
    bool running = true;  // no minibatch has passed target_kl yet
  };

  // Everything that one thread does. Between two barriers no thread reads what another writes.
  void work(int64_t thread) {
    const auto for_parts = [&](auto body) {
      for (int64_t part = thread; part < call_.num_parts; part += call_.num_threads) body(part);
    };
    const int64_t evaluations = call_.recompute_advantage ? call_.num_epochs : 1, each = call_.num_minibatches / evaluations;
    Progress progress{*call_.step};
    for (int64_t l = 0; l < call_.num_minibatches; ++l) {
      if (l % each == 0) {
        for_parts([&](int64_t part) { evaluate_rollout(part, l == 0); });
        barrier_.wait();
        if (thread == 0) {
          const float mean = return_mean_, std = return_std_;
          estimate_advantages();
          if (l == 0) explained_variance(std);
          if (!progress.running) return_mean_ = mean, return_std_ = std;  // it learns no more
        }
        barrier_.wait();
        if (call_.num_ranks == 1) {
          for_parts([&](int64_t part) { minibatch_statistics(l + part, l + each, call_.num_parts); });
        } else if (thread == 0) {
          minibatch_statistics(l, l + each, 1);
        }
        barrier_.wait();
      }
      if (failed_) return;
      for_parts([&](int64_t part) { minibatch_gradient(part, l); });
      barrier_.wait();
      if (call_.num_ranks > 1) {
        if (thread == 0) sum_over_ranks();
        barrier_.wait();
      }
      for_parts([&](int64_t part) { add_up(part); });
      barrier_.wait();
      const LossSums sums = whole_sums();
      progress.running = progress.running && static_cast<float>(sums.approx_kl) <= *call_.target_kl;
      const bool applied = progress.running && statistics_[l].num_transitions > 0.0;
      const auto norm = static_cast<float>(gradient_norm());
      if (thread == 0) log_minibatch(l, sums, norm, applied);
      if (applied) {
        progress.step += 1.0f;
        for_parts([&](int64_t part) { adam_step(part, norm, progress.step); });
      }
      barrier_.wait();
    }
    if (thread == 0) *call_.new_step = progress.step;
  }

  // ppo.minibatch_gradient: this part's rows of minibatch l.
  void minibatch_gradient(int64_t number, int64_t l) {
    Part& part = parts_[number];
    network_.transpose_heads(params_.get(), part.turned.get());
    network_.transpose_layers(params_.get(), part.turned.get());
    std::memset(part.gradient.get(), 0, network_.size * sizeof(float));
    part.sums = LossSums();
    const auto [first, last] = share_of(number, call_.minibatch_size);
    const int64_t* index = call_.permutation + l * call_.minibatch_size;
    for (int64_t from = first; from < last; from += kBlockRows) {
      const int64_t n = std::min(kBlockRows, last - from);
      forward_rows(part, call_.obs, index + from, n);
      loss_gradient(part, index + from, n, statistics_[l]);
      for (size_t trunk = 0; trunk < network_.trunks.size(); ++trunk) {
        backward_trunk(network_, params_.get(), part.turned.get(), n, part.block, trunk, part.gradient.get());
      }
    }
  }

  // ppo_loss of n rows of the rollout, added to part.sums, and its gradient with respect to the outputs of the networks.
  void loss_gradient(Part& part, const int64_t* rows, int64_t n, const Statistics& statistics) {
    const Block& block = part.block;
    read_actions(part, rows, n);
    read_targets(part, rows, n, statistics);
    const float scale = 1.0f / static_cast<float>(std::max(statistics.num_transitions, 1.0));
    for (int64_t r = 0; r < n; r += kWidth) {
      RowLosses losses;
      const Outcome outcome = distribution(part, r);
      const RowGradients gradients = ppo_loss(outcome, load(block.critic.column(0) + r), part.target, r,
                                              load(part.target.column(kValid) + r) * scale, coefficients_, &losses);
      const Integers counted = lanes() < static_cast<int32_t>(n - r);
      add(losses, counted, &part.sums);
      actor_gradient(part, r, counted, gradients);
      for (int64_t i = 0; i < kWidth; ++i) *block.d_critic.row(r + i) = gradients.value[i];
    }
  }

  // The columns of targets; the last row also fills what is left of a register.
  void read_targets(Part& part, const int64_t* rows, int64_t n, const Statistics& statistics) {
    for (int64_t i = 0; i < padded(n); ++i) {
      const Target& target = targets_[rows[std::min(i, n - 1)]];
      part.target.column(kOldLogProb)[i] = target.old_log_prob;
      part.target.column(kAdvantage)[i] = (target.advantage - statistics.advantage_mean) * statistics.advantage_scale;
      part.target.column(kValueTarget)[i] = target.value_target;
      part.target.column(kOldValue)[i] = target.old_value;
      part.target.column(kValid)[i] = target.valid;
    }
  }

  static void add(const RowLosses& losses, Integers counted, LossSums* sums) {
    sums->policy_loss += sum(where(counted, losses.policy_loss));
    sums->value_loss += sum(where(counted, losses.value_loss));
    sums->entropy += sum(where(counted, losses.entropy));
    sums->approx_kl += sum(where(counted, losses.approx_kl));
    sums->clipfrac += sum(where(counted, losses.clipfrac));
    const Vector deviation = where(counted, losses.deviation);
    for (int64_t lane = 0; lane < kWidth; ++lane) sums->deviation = maximum(sums->deviation, deviation[lane]);
  }

  void actor_gradient(Part& part, int64_t r, Integers counted, const RowGradients& gradients) {
    const Columns &out = part.block.actor, &d_out = part.d_actor;
    categorical_gradient(network_.choices, part.action, r, out, part.entropies, gradients.log_prob, gradients.entropy, d_out);
    normal_gradient(network_, out, r, params_.get() + network_.log_std, counted, gradients.log_prob, gradients.entropy, d_out,
                    part.gradient.get() + network_.log_std);
    for (int64_t a = 0; a < network_.action_size; ++a) {
      Vector gradient = load(d_out.column(a) + r);
      if (call_.action_mask && a < network_.num_logits) gradient *= load(part.legal.column(a) + r);
      for (int64_t i = 0; i < kWidth; ++i) part.block.d_actor.row(r + i)[a] = gradient[i];
    }
  }

  // The gradient and the metrics of all processes, left in those of part 0.
  void sum_over_ranks() {
    for (int64_t part = 1; part < call_.num_parts; ++part) {
      for (int64_t i = 0; i < network_.size; ++i) parts_[0].gradient.get()[i] += parts_[part].gradient.get()[i];
      std::memset(parts_[part].gradient.get(), 0, network_.size * sizeof(float));
    }
    LossSums sums = whole_sums();
    network_.unpack(parts_[0].gradient.get(), flat_.data());  // packed, its order would depend on the processor
    float* metrics = flat_.data() + network_.flat_size;
    float* deviations = metrics + kNumMetrics;
    std::fill(metrics, deviations + call_.num_ranks, 0.0f);
    const double own[] = {sums.policy_loss, sums.value_loss, sums.entropy, sums.approx_kl, sums.clipfrac};
    std::copy(own, own + 5, metrics);
    deviations[call_.rank] = sums.deviation;  // a maximum by a sum: each process has its own place
    if (call_.exchange(flat_.data(), static_cast<int64_t>(flat_.size())) != 0) failed_ = true;
    network_.pack(flat_.data(), parts_[0].gradient.get());
    sums = {metrics[0], metrics[1], metrics[2], metrics[3], metrics[4], deviations[0]};
    for (int64_t rank = 1; rank < call_.num_ranks; ++rank) sums.deviation = maximum(sums.deviation, deviations[rank]);
    for (Part& part : parts_) part.sums = LossSums();
    parts_[0].sums = sums;
  }

  LossSums whole_sums() const {
    LossSums whole;
    for (const Part& part : parts_) {
      whole.policy_loss += part.sums.policy_loss;
      whole.value_loss += part.sums.value_loss;
      whole.entropy += part.sums.entropy;
      whole.approx_kl += part.sums.approx_kl;
      whole.clipfrac += part.sums.clipfrac;
      whole.deviation = maximum(whole.deviation, part.sums.deviation);
    }
    return whole;
  }

  // This part's stretch of the parameters, in whole registers.
  std::pair<int64_t, int64_t> stretch_of(int64_t part) const {
    const auto [first, last] = share_of(part, network_.size / kWidth);
    return {first * kWidth, last * kWidth};
  }

  // The sum of all parts' gradients, in that of part 0, and its squares.
  void add_up(int64_t number) {
    const auto [first, last] = stretch_of(number);
    double squares = 0.0;
    for (int64_t from = first; from < last; from += 64 * kWidth) {  // few enough for float sums of squares
      Vector some = {};
      for (int64_t i = from; i < std::min(from + 64 * kWidth, last); i += kWidth) {
        Vector sum = load(parts_[0].gradient.get() + i);
        for (size_t part = 1; part < parts_.size(); ++part) sum += load(parts_[part].gradient.get() + i);
        if (parts_.size() > 1) store(parts_[0].gradient.get() + i, sum);
        some += sum * sum;
      }
      for (int lane = 0; lane < kWidth; ++lane) squares += some[lane];
    }
    parts_[number].squares = squares;
  }

  double gradient_norm() const {
    double squares = 0.0;
    for (const Part& part : parts_) squares += part.squares;
    return std::sqrt(squares);
  }

  // adam.clip_by_global_norm and adam_step, on this part's stretch. step: counted from 1.
  void adam_step(int64_t part, float norm, float step) {
    const float clip = minimum(*call_.max_grad_norm / (norm + 1e-6f), 1.0f);
    const float correction1 = -std::expm1(step * static_cast<float>(std::log(0.9)));
    const float correction2 = -std::expm1(step * static_cast<float>(std::log(0.999)));
    const float size = *call_.learning_rate / correction1, unbias = 1.0f / correction2;
    const float eps = *call_.adam_eps;
    const auto [first, last] = stretch_of(part);
    float *params = params_.get(), *exp_avg = exp_avg_.get(), *exp_avg_sq = exp_avg_sq_.get();
    for (int64_t i = first; i < last; i += kWidth) {
      const Vector gradient = load(parts_[0].gradient.get() + i) * clip;
      const Vector mean = load(exp_avg + i) + 0.1f * (gradient - load(exp_avg + i));
      const Vector square = 0.999f * load(exp_avg_sq + i) + 0.001f * (gradient * gradient);
      store(exp_avg + i, mean);
      store(exp_avg_sq + i, square);
      store(params + i, load(params + i) - size * mean / (sqrt(square * unbias) + eps));
    }
  }

  void log_minibatch(int64_t l, const LossSums& sums, float norm, bool applied) {
    const double metrics[kNumMetrics] = {sums.policy_loss, sums.value_loss, sums.entropy,   sums.approx_kl,
                                         sums.clipfrac,    norm,            sums.deviation, applied ? 1.0 : 0.0};
    std::copy(metrics, metrics + kNumMetrics, call_.minibatch_metrics + l * kNumMetrics);
  }

  // ppo.summarize
  void summarize() const {
    const int64_t n = call_.num_minibatches;
    double updates = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < n * kNumMetrics; ++i) finite = finite && std::isfinite(call_.minibatch_metrics[i]);
    for (int64_t i = 0; i < network_.flat_size; ++i) finite = finite && std::isfinite(call_.new_params[i]);
    for (int64_t l = 0; l < n; ++l) updates += call_.minibatch_metrics[l * kNumMetrics + kNumMetrics - 1];
    for (int64_t m = 0; m < kNumMetrics; ++m) {
      double mean = 0.0;
      for (int64_t l = 0; l < n; ++l) {
        const float* metrics = call_.minibatch_metrics + l * kNumMetrics;
        mean += metrics[m] * (updates > 0.0 ? metrics[kNumMetrics - 1] / updates : 1.0 / n);
      }
      call_.summary[m] = static_cast<float>(mean);
    }
    call_.summary[kNumMetrics] = *call_.explained_variance;
    call_.summary[kNumMetrics + 1] = static_cast<float>(updates);
    call_.summary[kNumMetrics + 2] = finite ? 1.0f : 0.0f;
  }

  Floats exp_avg_, exp_avg_sq_;  // packed
  std::vector<float> flat_;      // what processes exchange
  Coefficients coefficients_;
  Barrier barrier_;
};

}  // namespace fastppo
