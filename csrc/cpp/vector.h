// Vectors of floats as GCC's and Clang's extension has them, VECTOR_BYTES long, which the file that
// includes this defines; and the few functions on them that the kernels need. Everything has
// internal linkage: each instruction set gets its own.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef std::uint32_t Integers __attribute__((vector_size(VECTOR_BYTES)));

inline Vector load(const float* address) {
  Vector v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

inline void store(float* address, Vector v) { std::memcpy(address, &v, sizeof v); }

inline Vector splat(float value) { return value - Vector{}; }

inline float sum(Vector v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// exp(v), to about 2 units in the last place; v is clamped to where the result is a normal number.
// Range reduction to |r| <= ln(2) / 2 and a polynomial, as in Cephes' expf.
inline Vector exponential(Vector v) {
  v = v > 88.0f ? splat(88.0f) : v;
  v = v < -87.0f ? splat(-87.0f) : v;
  // Adding 1.5 * 2^23 rounds to a whole number, in the low bits.
  const Vector shifted = v * 1.44269504088896341f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  Vector r = v - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // What is above these bits is shifted out.
  Integers exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent + 127) << 23;
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

inline Vector silu(Vector v) { return v / (1.0f + exponential(-v)); }

}  // namespace
