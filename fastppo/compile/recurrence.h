// LSTM and GRU over whole sequences: the parts of core/recurrence.py that go step by step. Letters and order of axes are its.
// Each call is one thread's, K cells one after the other, so that a cell's weights stay in the cache over all T steps.
// Included by native.cpp, whose headers it uses.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <vector>

namespace {

constexpr int64_t kPanel = 16;  // columns of a product that are worked off at once: two AVX registers, a cache line

using Vector = float __attribute__((vector_size(32), aligned(4)));

int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

// A matrix (inner, columns), element (j, c) at matrix[j * row_step + c * column_step], as panels of 16 columns, each (inner, 16).
std::vector<float> panels_of(const float* matrix, int64_t inner, int64_t columns, int64_t row_step, int64_t column_step) {
  std::vector<float> panels(padded(columns) * inner);
  for (int64_t c = 0; c < columns; ++c) {
    float* panel = panels.data() + c / kPanel * kPanel * inner + c % kPanel;
    for (int64_t j = 0; j < inner; ++j) panel[j * kPanel] = matrix[j * row_step + c * column_step];
  }
  return panels;
}

// Sums in eight registers at once: a fused multiply-add takes four cycles, and two begin in each.
template <int kRows, int kPanels>
void rows_times_panels(const float* x, int64_t x_step, const float* panels, int64_t inner, float* out, int64_t out_step) {
  Vector sum[kRows][kPanels][2] = {};
  for (int64_t j = 0; j < inner; ++j) {
    for (int p = 0; p < kPanels; ++p) {
      const auto* row = reinterpret_cast<const Vector*>(panels + (p * inner + j) * kPanel);
      for (int r = 0; r < kRows; ++r) {
        sum[r][p][0] += x[r * x_step + j] * row[0];
        sum[r][p][1] += x[r * x_step + j] * row[1];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      auto* to = reinterpret_cast<Vector*>(out + r * out_step + p * kPanel);
      to[0] = sum[r][p][0];
      to[1] = sum[r][p][1];
    }
  }
}

template <int kRows, int kPanels>
void some_rows(const float* x, int64_t inner, const float* panels, int64_t width, float* out) {
  int64_t c = 0;
  for (; c + kPanels * kPanel <= width; c += kPanels * kPanel) {
    rows_times_panels<kRows, kPanels>(x, inner, panels + c * inner, inner, out + c, width);
  }
  for (; c < width; c += kPanel) rows_times_panels<kRows, 1>(x, inner, panels + c * inner, inner, out + c, width);
}

// out (n, padded columns) = x (n, inner) times a matrix as panels
void product(const float* x, int64_t n, int64_t inner, const std::vector<float>& panels, int64_t columns, float* out) {
  const int64_t width = padded(columns);
  int64_t r = 0;
  for (; r + 4 <= n; r += 4) some_rows<4, 1>(x + r * inner, inner, panels.data(), width, out + r * width);
  if (n - r >= 2) {
    some_rows<2, 2>(x + r * inner, inner, panels.data(), width, out + r * width);
    r += 2;
  }
  if (n > r) some_rows<1, 4>(x + r * inner, inner, panels.data(), width, out + r * width);
}

// As core.compilation.rational_tanh, without a call and without a branch, so that loops over it become vectors.
inline float fast_tanh(float x) {
  constexpr float kBound = 7.90531110763549805f;
  x = x > kBound ? kBound : x;
  x = x < -kBound ? -kBound : x;
  const float s = x * x;
  float p = -2.76076847742355e-16f * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}

inline float fast_sigmoid(float x) { return 0.5f * fast_tanh(0.5f * x) + 0.5f; }

struct Sizes {
  int64_t steps, cells, n, width;  // T, K, n, H
};

// Data of a contiguous float tensor, or nullptr.
float* data_of(AtenTensorHandle tensor) {
  void* data = nullptr;
  bool contiguous = false;
  if (aoti_torch_is_contiguous(tensor, &contiguous) || !contiguous || aoti_torch_get_data_ptr(tensor, &data)) return nullptr;
  return static_cast<float*>(data);
}

Sizes sizes_of(AtenTensorHandle states) {  // (T, K, n, H)
  int64_t* sizes = nullptr;
  if (aoti_torch_get_sizes(states, &sizes)) return {0, 0, 0, 0};
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

// A new float tensor (T, K, n, size), or (K, n, size) where steps is 0.
float* make(int64_t steps, int64_t cells, int64_t n, int64_t size, AtenTensorHandle* result) {
  const int64_t sizes[] = {steps, cells, n, size};
  const int64_t strides[] = {cells * n * size, n * size, size, 1};
  const int skip = steps == 0;
  if (aoti_torch_empty_strided(4 - skip, sizes + skip, strides + skip, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                               result)) {
    return nullptr;
  }
  return data_of(*result);
}

// One row of a step: see core.recurrence.lstm_step and gru_step.
void lstm_row(const float* __restrict__ in, const float* __restrict__ add, const float* __restrict__ c, int64_t width,
              float* __restrict__ activated, float* __restrict__ h_after, float* __restrict__ c_after) {
  for (int64_t j = 0; j < width; ++j) {
    const float i = fast_sigmoid(in[j] + add[j]), f = fast_sigmoid(in[width + j] + add[width + j]);
    const float g = fast_tanh(in[2 * width + j] + add[2 * width + j]);
    const float o = fast_sigmoid(in[3 * width + j] + add[3 * width + j]);
    const float after = f * c[j] + i * g;
    activated[j] = i;
    activated[width + j] = f;
    activated[2 * width + j] = g;
    activated[3 * width + j] = o;
    c_after[j] = after;
    h_after[j] = o * fast_tanh(after);
  }
}

void gru_row(const float* __restrict__ in, const float* __restrict__ add, const float* __restrict__ bias,
             const float* __restrict__ h, int64_t width, float* __restrict__ activated, float* __restrict__ h_after) {
  for (int64_t j = 0; j < width; ++j) {
    const float r = fast_sigmoid(in[j] + add[j]), z = fast_sigmoid(in[width + j] + add[width + j]);
    const float inner = add[2 * width + j] + bias[j];
    const float n = fast_tanh(in[2 * width + j] + r * inner);
    activated[j] = r;
    activated[width + j] = z;
    activated[2 * width + j] = n;
    activated[3 * width + j] = inner;
    h_after[j] = (1.0f - z) * n + z * h[j];
  }
}

void mask_rows(const float* from, const float* keep, int64_t n, int64_t width, float* to) {
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < width; ++j) to[r * width + j] = from[r * width + j] * keep[r];
  }
}

}  // namespace

// gates (T, K, n, 4H), weight (K, H, 4H), keep (T, 1, n, 1), h, c (K, n, H) -> h, c (T, K, n, H), activated (T, K, n, 4H)
extern "C" AOTITorchError aoti_torch_cpu_lstm(AtenTensorHandle gates_of, AtenTensorHandle weight_of, AtenTensorHandle keep_of,
                                            AtenTensorHandle h_of, AtenTensorHandle c_of, AtenTensorHandle* h_result,
                                            AtenTensorHandle* c_result, AtenTensorHandle* activated_result) {
  const auto [steps, cells, n, four] = sizes_of(gates_of);
  const int64_t width = four / 4, wide = padded(four);
  const float *gates = data_of(gates_of), *weight = data_of(weight_of), *keep = data_of(keep_of);
  const float *h_start = data_of(h_of), *c_start = data_of(c_of);
  float *hs = make(steps, cells, n, width, h_result), *cs = make(steps, cells, n, width, c_result);
  float* activated = make(steps, cells, n, four, activated_result);
  if (!gates || !weight || !keep || !h_start || !c_start || !hs || !cs || !activated) return AOTI_TORCH_FAILURE;
  std::vector<float> h(n * width), c(n * width), sum(n * wide);
  for (int64_t k = 0; k < cells; ++k) {
    const auto panels = panels_of(weight + k * width * four, width, four, four, 1);
    const float *h_before = h_start + k * n * width, *c_before = c_start + k * n * width;
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (t * cells + k) * n;
      mask_rows(h_before, keep + t * n, n, width, h.data());
      mask_rows(c_before, keep + t * n, n, width, c.data());
      product(h.data(), n, width, panels, four, sum.data());
      for (int64_t r = 0; r < n; ++r) {
        lstm_row(gates + (at + r) * four, sum.data() + r * wide, c.data() + r * width, width, activated + (at + r) * four,
                 hs + (at + r) * width, cs + (at + r) * width);
      }
      h_before = hs + at * width;
      c_before = cs + at * width;
    }
  }
  return AOTI_TORCH_SUCCESS;
}

// weight (K, H, 4H), keep (T, 1, n, 1), into_c, f, grad_h, grad_c (T, K, n, H), slope (T, K, n, 4H)
// -> d_gates (T, K, n, 4H), dh, dc (K, n, H)
extern "C" AOTITorchError aoti_torch_cpu_lstm_backward(AtenTensorHandle weight_of, AtenTensorHandle keep_of,
                                                     AtenTensorHandle into_c_of, AtenTensorHandle slope_of, AtenTensorHandle f_of,
                                                     AtenTensorHandle grad_h_of, AtenTensorHandle grad_c_of,
                                                     AtenTensorHandle* d_gates_result, AtenTensorHandle* dh_result,
                                                     AtenTensorHandle* dc_result) {
  const auto [steps, cells, n, width] = sizes_of(grad_h_of);
  const int64_t four = 4 * width, wide = padded(width);
  const float *weight = data_of(weight_of), *keep = data_of(keep_of), *into_c = data_of(into_c_of), *slope = data_of(slope_of);
  const float *f = data_of(f_of), *grad_h = data_of(grad_h_of), *grad_c = data_of(grad_c_of);
  float* d_gates = make(steps, cells, n, four, d_gates_result);
  float *dhs = make(0, cells, n, width, dh_result), *dcs = make(0, cells, n, width, dc_result);
  if (!weight || !keep || !into_c || !slope || !f || !grad_h || !grad_c || !d_gates || !dhs || !dcs) return AOTI_TORCH_FAILURE;
  std::vector<float> sum(n * wide);
  for (int64_t k = 0; k < cells; ++k) {
    const auto panels = panels_of(weight + k * width * four, four, width, 1, four);  // transposed
    float *dh = dhs + k * n * width, *dc = dcs + k * n * width;
    std::memset(dh, 0, n * width * sizeof(float));
    std::memset(dc, 0, n * width * sizeof(float));
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t at = (t * cells + k) * n;
      float* d_rows = d_gates + at * four;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = (at + r) * width;
        const float* __restrict__ slopes = slope + (at + r) * four;
        float* __restrict__ d_row = d_rows + r * four;
        float* __restrict__ h_row = dh + r * width;
        float* __restrict__ c_row = dc + r * width;
        for (int64_t j = 0; j < width; ++j) {
          const float d_h = h_row[j] + grad_h[row + j];
          const float d_c = c_row[j] + grad_c[row + j] + d_h * into_c[row + j];
          d_row[j] = d_c * slopes[j];
          d_row[width + j] = d_c * slopes[width + j];
          d_row[2 * width + j] = d_c * slopes[2 * width + j];
          d_row[3 * width + j] = d_h * slopes[3 * width + j];
          c_row[j] = d_c * f[row + j] * keep[t * n + r];
        }
      }
      product(d_rows, n, four, panels, width, sum.data());
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t j = 0; j < width; ++j) dh[r * width + j] = sum[r * wide + j] * keep[t * n + r];
      }
    }
  }
  return AOTI_TORCH_SUCCESS;
}

// gates (T, K, n, 3H), weight (K, H, 3H), bias (K, H), keep (T, 1, n, 1), h (K, n, H) -> h (T, K, n, H), activated (T, K, n, 4H)
extern "C" AOTITorchError aoti_torch_cpu_gru(AtenTensorHandle gates_of, AtenTensorHandle weight_of, AtenTensorHandle bias_of,
                                           AtenTensorHandle keep_of, AtenTensorHandle h_of, AtenTensorHandle* h_result,
                                           AtenTensorHandle* activated_result) {
  const auto [steps, cells, n, three] = sizes_of(gates_of);
  const int64_t width = three / 3, wide = padded(three), four = 4 * width;
  const float *gates = data_of(gates_of), *weight = data_of(weight_of), *bias = data_of(bias_of), *keep = data_of(keep_of);
  const float* h_start = data_of(h_of);
  float *hs = make(steps, cells, n, width, h_result), *activated = make(steps, cells, n, four, activated_result);
  if (!gates || !weight || !bias || !keep || !h_start || !hs || !activated) return AOTI_TORCH_FAILURE;
  std::vector<float> h(n * width), sum(n * wide);
  for (int64_t k = 0; k < cells; ++k) {
    const auto panels = panels_of(weight + k * width * three, width, three, three, 1);
    const float* h_before = h_start + k * n * width;
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (t * cells + k) * n;
      mask_rows(h_before, keep + t * n, n, width, h.data());
      product(h.data(), n, width, panels, three, sum.data());
      for (int64_t r = 0; r < n; ++r) {
        gru_row(gates + (at + r) * three, sum.data() + r * wide, bias + k * width, h.data() + r * width, width,
                activated + (at + r) * four, hs + (at + r) * width);
      }
      h_before = hs + at * width;
    }
  }
  return AOTI_TORCH_SUCCESS;
}

// weight (K, H, 3H), keep (T, 1, n, 1), slope (T, K, n, 3H), z, grad_h (T, K, n, H)
// -> d_product (T, K, n, 3H), d_state (T, K, n, H), dh (K, n, H)
extern "C" AOTITorchError aoti_torch_cpu_gru_backward(AtenTensorHandle weight_of, AtenTensorHandle keep_of, AtenTensorHandle slope_of,
                                                    AtenTensorHandle z_of, AtenTensorHandle grad_h_of,
                                                    AtenTensorHandle* d_product_result, AtenTensorHandle* d_state_result,
                                                    AtenTensorHandle* dh_result) {
  const auto [steps, cells, n, width] = sizes_of(grad_h_of);
  const int64_t three = 3 * width, wide = padded(width);
  const float *weight = data_of(weight_of), *keep = data_of(keep_of), *slope = data_of(slope_of), *z = data_of(z_of);
  const float* grad_h = data_of(grad_h_of);
  float *d_product = make(steps, cells, n, three, d_product_result), *d_state = make(steps, cells, n, width, d_state_result);
  float* dhs = make(0, cells, n, width, dh_result);
  if (!weight || !keep || !slope || !z || !grad_h || !d_product || !d_state || !dhs) return AOTI_TORCH_FAILURE;
  std::vector<float> sum(n * wide);
  for (int64_t k = 0; k < cells; ++k) {
    const auto panels = panels_of(weight + k * width * three, three, width, 1, three);  // transposed
    float* dh = dhs + k * n * width;
    std::memset(dh, 0, n * width * sizeof(float));
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t at = (t * cells + k) * n;
      float *d_rows = d_product + at * three, *d_states = d_state + at * width;
      for (int64_t r = 0; r < n; ++r) {
        const float* __restrict__ slopes = slope + (at + r) * three;
        const float* __restrict__ grad = grad_h + (at + r) * width;
        const float* __restrict__ h_row = dh + r * width;
        float* __restrict__ d_row = d_rows + r * three;
        float* __restrict__ state = d_states + r * width;
        for (int64_t j = 0; j < width; ++j) {
          const float d_h = h_row[j] + grad[j];
          state[j] = d_h;
          d_row[j] = d_h * slopes[j];
          d_row[width + j] = d_h * slopes[width + j];
          d_row[2 * width + j] = d_h * slopes[2 * width + j];
        }
      }
      product(d_rows, n, three, panels, width, sum.data());
      for (int64_t r = 0; r < n; ++r) {
        const float* z_row = z + (at + r) * width;
        for (int64_t j = 0; j < width; ++j) {
          dh[r * width + j] = (sum[r * wide + j] + d_states[r * width + j] * z_row[j]) * keep[t * n + r];
        }
      }
    }
  }
  return AOTI_TORCH_SUCCESS;
}
