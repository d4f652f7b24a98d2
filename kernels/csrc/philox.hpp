// Philox4x64-10 (Salmon et al., SC 2011) with the stream, and the bounded integers, of NumPy.
#pragma once

#include <cstdint>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace fastrecycle {

struct Wide {
  std::uint64_t high, low;
};

// The 128-bit product.
inline Wide multiply(std::uint64_t a, std::uint64_t b) {
#if defined(__SIZEOF_INT128__)
  const auto product = static_cast<unsigned __int128>(a) * b;
  return {static_cast<std::uint64_t>(product >> 64), static_cast<std::uint64_t>(product)};
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_ARM64))
  return {__umulh(a, b), a * b};
#else
  const std::uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
  const std::uint64_t mid = a1 * b0 + ((a0 * b0) >> 32);
  const std::uint64_t carry = a0 * b1 + (mid & 0xffffffff);
  return {a1 * b1 + (mid >> 32) + (carry >> 32), a * b};
#endif
}

// The words of numpy.random.Philox(key=[key0, key1]), from its first on.
class Philox {
 public:
  Philox(std::uint64_t key0, std::uint64_t key1) : key0_(key0), key1_(key1) {}

  // numpy's random_raw
  std::uint64_t next() {
    if (lane_ == 4) {
      block(++counter_, block_);
      lane_ = 0;
    }
    return block_[lane_++];
  }

  // count words at once
  void fill(std::uint64_t* out, std::int64_t count) {
    while (count > 0 && lane_ < 4) {
      *out++ = block_[lane_++];
      --count;
    }
    for (; count >= 4; count -= 4, out += 4) block(++counter_, out);
    while (count-- > 0) *out++ = next();
  }

  // numpy's Generator.random: [0, 1) in steps of 2^-53
  double uniform() { return static_cast<double>(next() >> 11) * (1.0 / 9007199254740992.0); }

  // numpy's Generator.integers(last + 1), Lemire's method; a word serves two draws
  std::uint32_t bounded(std::uint32_t last) {
    if (last == 0) return 0;
    if (last == 0xffffffff) return half();
    const std::uint32_t range = last + 1;
    std::uint64_t product = std::uint64_t{half()} * range;
    if (static_cast<std::uint32_t>(product) < range) {
      const std::uint32_t uneven = (0xffffffff - last) % range;
      while (static_cast<std::uint32_t>(product) < uneven) {
        product = std::uint64_t{half()} * range;
      }
    }
    return static_cast<std::uint32_t>(product >> 32);
  }

 private:
  void block(std::uint64_t counter, std::uint64_t* out) const {
    std::uint64_t c0 = counter, c1 = 0, c2 = 0, c3 = 0, k0 = key0_, k1 = key1_;
    for (int round = 0; round < 10; ++round) {
      const Wide a = multiply(0xD2E7470EE14C6C93, c0), b = multiply(0xCA5A826395121157, c2);
      c0 = b.high ^ c1 ^ k0;
      c1 = b.low;
      c2 = a.high ^ c3 ^ k1;
      c3 = a.low;
      k0 += 0x9E3779B97F4A7C15;
      k1 += 0xBB67AE8584CAA73B;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  }

  std::uint32_t half() {  // the low half of a word, then its high one
    if (has_half_) {
      has_half_ = false;
      return half_;
    }
    const std::uint64_t word = next();
    has_half_ = true;
    half_ = static_cast<std::uint32_t>(word >> 32);
    return static_cast<std::uint32_t>(word);
  }

  std::uint64_t key0_, key1_;
  std::uint64_t counter_ = 0;
  std::uint64_t block_[4] = {};
  unsigned lane_ = 4;
  bool has_half_ = false;
  std::uint32_t half_ = 0;
};

}  // namespace fastrecycle
