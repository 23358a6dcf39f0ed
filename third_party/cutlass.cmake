# CUTLASS 4.2 headers, for the kernels of sm_90a (wgmma, TMA): from EFFCORE_CUTLASS_DIR, or from the Python package
# nvidia-cutlass, which is a folder of headers (pip install --no-deps nvidia-cutlass). Sets EFFCORE_HOPPER and CUTLASS_INCLUDE.
# Without the headers, or without 90a among the architectures, those kernels are left out and the portable ones serve.
set(EFFCORE_CUTLASS_DIR "" CACHE PATH "CUTLASS, the folder that holds include/cutlass; empty: look for the Python package nvidia-cutlass")
set(EFFCORE_HOPPER OFF)
if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90a")
  set(CUTLASS_ROOT "${EFFCORE_CUTLASS_DIR}")
  if(NOT CUTLASS_ROOT)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('cutlass_library').origin).parent / 'source')"
      OUTPUT_VARIABLE CUTLASS_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  if(EXISTS "${CUTLASS_ROOT}/include/cute/arch/mma_sm90_gmma.hpp")
    set(EFFCORE_HOPPER ON)
    set(CUTLASS_INCLUDE "${CUTLASS_ROOT}/include")
  elseif(EFFCORE_CUTLASS_DIR)
    message(FATAL_ERROR "EFFCORE_CUTLASS_DIR=${EFFCORE_CUTLASS_DIR} holds no include/cute/arch/mma_sm90_gmma.hpp (CUTLASS 4.2)")
  endif()
endif()
message(STATUS "effcore: kernels for sm_90a ${EFFCORE_HOPPER}")
