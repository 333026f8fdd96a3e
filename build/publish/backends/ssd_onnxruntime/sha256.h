//! \file sha256.h
//! SHA-256 (FIPS 180-4), so that a model file can be compared with the digest in its config.pbtxt.

#ifndef SSD_SHA256_H
#define SSD_SHA256_H

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace sha256
{
//! FIPS 180-4, 4.2.2.
constexpr uint32_t kRound[64] = {0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
    0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152,
    0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138,
    0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70,
    0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5,
    0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa,
    0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr size_t kBlock = 64;

inline uint32_t rotated(uint32_t value, int bits) noexcept
{
    return value >> bits | value << (32 - bits);
}

//! 6.2.2: takes one block into the state.
inline void take(std::array<uint32_t, 8>& state, unsigned char const* block) noexcept
{
    uint32_t w[64];
    for (int i = 0; i < 16; ++i)
    {
        w[i] = uint32_t{block[4 * i]} << 24 | uint32_t{block[4 * i + 1]} << 16 | uint32_t{block[4 * i + 2]} << 8
            | block[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i)
    {
        uint32_t const s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t const s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i)
    {
        uint32_t const s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
        uint32_t const first = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
        uint32_t const s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
        uint32_t const second = s0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + first;
        d = c;
        c = b;
        b = a;
        a = first + second;
    }
    uint32_t const added[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i)
    {
        state[i] += added[i];
    }
}

//! The digest of `data` in hexadecimal digits.
inline std::string digest(std::string const& data)
{
    std::array<uint32_t, 8> state{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab,
        0x5be0cd19};
    auto const* bytes = reinterpret_cast<unsigned char const*>(data.data());
    size_t const whole = data.size() / kBlock * kBlock;
    for (size_t at = 0; at < whole; at += kBlock)
    {
        take(state, bytes + at);
    }
    // 5.1.1: what is left, a set bit, zeros, and the length in bits at the end of a block.
    unsigned char last[2 * kBlock]{};
    size_t const rest = data.size() - whole;
    std::copy_n(bytes + whole, rest, last);
    last[rest] = 0x80;
    size_t const size = rest + 9 <= kBlock ? kBlock : 2 * kBlock;
    for (size_t i = 0; i < 8; ++i)
    {
        last[size - 1 - i] = static_cast<unsigned char>(uint64_t{data.size()} * 8 >> 8 * i);
    }
    for (size_t at = 0; at < size; at += kBlock)
    {
        take(state, last + at);
    }
    std::string text;
    for (uint32_t const word : state)
    {
        for (int shift = 28; shift >= 0; shift -= 4)
        {
            text += "0123456789abcdef"[word >> shift & 15];
        }
    }
    return text;
}
} // namespace sha256

#endif // SSD_SHA256_H
