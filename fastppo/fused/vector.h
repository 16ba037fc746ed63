// Vectors of one register's width, and the functions of them that networks need. Their errors are below 3e-7, or 3e-7 of results
// above 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace fastppo {

#if defined(__AVX512F__) || defined(FASTPPO_WIDE)  // the second for tests on other processors
constexpr int kWidth = 16;  // floats in a register
constexpr int kTileRows = 12;  // rows of a tile of sums: 12 x 2 of 32 registers
#else
constexpr int kWidth = 8;
constexpr int kTileRows = 6;  // 6 x 2 of 16 registers
#endif

using Vector = float __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
using Integers = int32_t __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }
inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector value) { *reinterpret_cast<Vector*>(x) = value; }
inline Vector broadcast(float x) { return x - Vector{}; }

inline Integers lanes() {
  Integers result;
  for (int lane = 0; lane < kWidth; ++lane) result[lane] = lane;
  return result;
}

inline Vector where(Integers condition, Vector x) { return condition ? x : Vector{}; }

inline Vector bits(Integers x) {
  Vector result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

inline Integers bits(Vector x) {
  Integers result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

// Groups of `step` lanes, by turns of a and of b: low takes the first of each two groups, high the second. With four lanes,
//   low<1>: a0 b0 a2 b2,   high<1>: a1 b1 a3 b3,   low<2>: a0 a1 b0 b1,   high<2>: a2 a3 b2 b3.
#ifdef __clang__
#define FASTPPO_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)
#else
#define FASTPPO_SHUFFLE(a, b, index) __builtin_shuffle(a, b, Integers{(index)...})
#endif

template <int step>
inline Vector low(Vector a, Vector b) {
  return [=]<int... lane>(std::integer_sequence<int, lane...>) {
    return FASTPPO_SHUFFLE(a, b, lane & step ? kWidth + lane - step : lane);
  }(std::make_integer_sequence<int, kWidth>());
}

template <int step>
inline Vector high(Vector a, Vector b) {
  return [=]<int... lane>(std::integer_sequence<int, lane...>) {
    return FASTPPO_SHUFFLE(a, b, lane & step ? kWidth + lane : lane + step);
  }(std::make_integer_sequence<int, kWidth>());
}

// Call body(i) for i in [0, n), each a constant, so that an array that it indexes is a set of registers. The compiler unrolls a loop
// too late for that. The functions that use it are FASTPPO_FLAT: all calls within them are inlined.
#define FASTPPO_FLAT __attribute__((flatten))

template <int n, class Body>
inline void unrolled(Body body) {
  [&]<int... i>(std::integer_sequence<int, i...>) { (body(std::integral_constant<int, i>()), ...); }(std::make_integer_sequence<int, n>());
}

// Register i becomes lane i of all.
template <int step = 1>
inline void transpose(Vector (&x)[kWidth]) {
  unrolled<kWidth>([&](auto i) {
    if constexpr ((i & step) == 0) {
      const Vector first = x[i], second = x[i + step];
      x[i] = low<step>(first, second);
      x[i + step] = high<step>(first, second);
    }
  });
  if constexpr (2 * step < kWidth) transpose<2 * step>(x);
}

// Lane i becomes the sum of register i.
template <int step = 1>
inline Vector totals(Vector (&x)[kWidth]) {
  unrolled<kWidth / (2 * step)>([&](auto i) {
    constexpr int first = i * 2 * step;
    x[first] = low<step>(x[first], x[first + step]) + high<step>(x[first], x[first + step]);
  });
  if constexpr (2 * step < kWidth) return totals<2 * step>(x);
  return x[0];
}

// Each lane becomes the sum of all.
template <int step = 1>
inline Vector spread_sum(Vector x) {
  x = low<step>(x, x) + high<step>(x, x);
  if constexpr (2 * step < kWidth) return spread_sum<2 * step>(x);
  return x;
}

// Of all lanes, in float64.
inline double sum(Vector x) {
  double total = 0.0;
  for (int lane = 0; lane < kWidth; ++lane) total += x[lane];
  return total;
}

// torch.minimum and torch.maximum: NaN passes through.
inline float minimum(float a, float b) { return a < b || a != a ? a : b; }
inline float maximum(float a, float b) { return a > b || a != a ? a : b; }
inline Vector minimum(Vector a, Vector b) { return ((a < b) | (a != a)) ? a : b; }
inline Vector maximum(Vector a, Vector b) { return ((a > b) | (a != a)) ? a : b; }

// Each comparison is false for NaN and then keeps x, so that NaN passes through. One instruction each, in this order.
inline Vector at_most(Vector x, float most) { return broadcast(most) < x ? broadcast(most) : x; }
inline Vector at_least(Vector x, float least) { return broadcast(least) > x ? broadcast(least) : x; }

// e^x = 2^n e^r with |r| <= ln(2) / 2; the polynomial for e^r is that of expf in Cephes (Moshier, 1992).
// remainder: e^x - 1 - x, exact for small x too.
inline Vector exp(Vector x, Vector* remainder) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Vector bounded = at_least(at_most(x, 89.0f), -104.0f);  // beyond, the result is inf or 0
  const Vector shifted = bounded * 1.44269504f + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r;
  const Integers whole = bits(shifted) - bits(broadcast(kRound));
  const Integers half = whole >> 1;  // in two steps: 2^n itself may overflow, or be subnormal
  const Vector power = (p + r + 1.0f) * bits((half + 127) << 23) * bits((whole - half + 127) << 23);
  *remainder = n == 0.0f ? p : power - 1.0f - x;
  return power;
}

inline Vector exp(Vector x) {
  Vector remainder;
  return exp(x, &remainder);
}

// The logarithm of positive numbers, or NaN. log(2^n f) with 0.7 <= f < 1.41; the polynomial is that of logf in Cephes.
inline Vector log(Vector x) {
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // the bits of sqrt(0.5)
  const Integers exponent = (bits(x) - kHalfRoot) >> 23;
  const Vector n = __builtin_convertvector(exponent, Vector), f = bits(bits(x) - (exponent << 23)) - 1.0f;
  Vector p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vector square = f * f;
  const Vector result = (p * square * f - n * 2.12194440e-4f - 0.5f * square) + f + n * 0.693359375f;
  return x != x ? x : result;
}

inline Vector sqrt(Vector x) {
  Vector root;
  for (int lane = 0; lane < kWidth; ++lane) root[lane] = __builtin_sqrtf(x[lane]);  // one instruction with -fno-math-errno
  return root;
}

// A rational function of degree 13 over 6, with the coefficients of Eigen's fast float tanh; +-1 beyond 7.9.
inline Vector tanh(Vector x) {
  x = at_least(at_most(x, 7.90531110763549805f), -7.90531110763549805f);
  const Vector square = x * x;
  Vector p = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * square - 8.60467152213735e-11f;
  p = p * square + 5.12229709037114e-08f;
  p = p * square + 1.48572235717979e-05f;
  p = p * square + 6.37261928875436e-04f;
  p = p * square + 4.89352455891786e-03f;
  Vector q = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * square + 2.26843463243900e-03f;
  q = q * square + 4.89352518554385e-03f;
  return x * p / q;
}

// The standard normal distribution function, from erf by formula 7.1.26 of Abramowitz and Stegun (1964). density: e^(-x^2 / 2).
inline Vector normal_cdf(Vector x, Vector density) {
  const Vector size = (x < 0.0f ? -x : x) * 0.70710678f;
  const Vector t = 1.0f / (size * 0.3275911f + 1.0f);
  Vector p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vector tail = 0.5f * p * t * density;
  return x < 0.0f ? tail : 1.0f - tail;
}

enum class Activation : int64_t { kTanh, kRelu, kElu, kSilu, kGelu };  // in the order of ACTIVATIONS in operators.py

// The activation of x, and its slope there.
template <Activation kind>
inline Vector activate(Vector x, Vector* slope) {
  if constexpr (kind == Activation::kTanh) {
    const Vector y = tanh(x);
    *slope = 1.0f - y * y;
    return y;
  } else if constexpr (kind == Activation::kRelu) {
    *slope = x <= 0.0f ? Vector{} : broadcast(1.0f);
    return x < 0.0f ? Vector{} : x;
  } else if constexpr (kind == Activation::kElu) {
    const Vector power = exp(x);
    *slope = x > 0.0f ? broadcast(1.0f) : power;
    return x > 0.0f ? x : power - 1.0f;
  } else if constexpr (kind == Activation::kSilu) {
    const Vector sigmoid = 1.0f / (exp(-x) + 1.0f);
    *slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
    return x * sigmoid;
  } else {
    const Vector density = exp(-0.5f * x * x);
    const Vector cdf = normal_cdf(x, density);
    *slope = cdf + x * density * 0.39894228f;
    return x * cdf;
  }
}

}  // namespace fastppo
