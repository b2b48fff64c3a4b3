// Which instruction sets this machine runs. Kept out of the ISA files: this must run on every machine.
#include "engine.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

#if defined(__aarch64__)
bool has_dot_products() {
#if defined(__APPLE__)
  return true;  // all of Apple's 64-bit desktop processors
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}
#endif

struct SupportedIsas {
  const Isa* isas[7] = {};  // the last stays null

  SupportedIsas() {
    int count = 0;
    isas[count++] = &lt4rec_isa_scalar;
#if defined(__x86_64__)
    // These builtins also ask whether the operating system saves the registers.
    __builtin_cpu_init();
    bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has) isas[count++] = &lt4rec_isa_avx2;
    if (has && __builtin_cpu_supports("avxvnni")) isas[count++] = lt4rec_isa_avx2_vnni();
    has = has && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bw");
    if (has) isas[count++] = &lt4rec_isa_avx512;
    has = has && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    const bool has_bf16 = has && __builtin_cpu_supports("avx512bf16");
    // Of Intel's cores a product of bfloat16 pairs takes as long as four of floats; AMD's take it in one cycle.
    const bool is_bf16_slower = __builtin_cpu_is("intel");
    if (has_bf16 && is_bf16_slower) isas[count++] = &lt4rec_isa_avx512_bf16;
    if (has) isas[count++] = &lt4rec_isa_avx512_vnni;
    if (has_bf16 && !is_bf16_slower) isas[count++] = &lt4rec_isa_avx512_bf16;
#elif defined(__aarch64__)
    isas[count++] = &lt4rec_isa_neon;  // every AArch64 has it
    if (has_dot_products()) isas[count++] = lt4rec_isa_neon_dot();
#endif
  }
};

}  // namespace

extern "C" const Isa* const* lt4rec_supported_isas(void) {
  static const SupportedIsas supported;
  return supported.isas;
}
