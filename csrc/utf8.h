// Whether bytes are UTF-8.
#ifndef LT4REC_SPARSE_UTF8_H
#define LT4REC_SPARSE_UTF8_H

#include <cstddef>
#include <cstdint>

namespace lt4rec {

// Shortest forms up to U+10FFFF. A surrogate alone is none, but Python's strings hold such, and write three bytes for it:
// `takes_surrogates` says whether it passes.
inline bool is_utf8(const char* text, std::size_t size, bool takes_surrogates) {
  for (std::size_t at = 0; at < size;) {
    const auto lead = uint8_t(text[at]);
    const std::size_t width = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    if (width == 0 || width > size - at) return false;
    for (std::size_t i = 1; i < width; ++i)
      if ((uint8_t(text[at + i]) & 0xc0) != 0x80) return false;
    const uint8_t next = width > 1 ? uint8_t(text[at + 1]) : uint8_t{0};
    if ((lead == 0xe0 && next < 0xa0) || (lead == 0xf0 && next < 0x90) || (lead == 0xf4 && next > 0x8f)) return false;
    if (lead == 0xed && next > 0x9f && !takes_surrogates) return false;
    at += width;
  }
  return true;
}

}  // namespace lt4rec
#endif
