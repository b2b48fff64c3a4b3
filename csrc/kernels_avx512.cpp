// AVX-512 F, VL and BW (Skylake server).
#define LT4REC_TARGET "avx512f,avx512vl,avx512bw,avx2,fma"
#define LT4REC_ISA lt4rec_isa_avx512
#define LT4REC_ISA_NAME "avx512"
#include "kernels_avx512.h"
