// Every instruction set of this processor's kind, in the place of csrc/isa.cpp: those that it lacks are emulated.
#include "engine.h"

extern "C" const Isa* const* lt4rec_supported_isas(void) {
  static const Isa* const isas[] = {&lt4rec_isa_scalar,      &lt4rec_isa_avx2,
                                    lt4rec_isa_avx2_vnni(),  &lt4rec_isa_avx512,
                                    &lt4rec_isa_avx512_vnni, &lt4rec_isa_avx512_bf16,
                                    nullptr};
  return isas;
}
