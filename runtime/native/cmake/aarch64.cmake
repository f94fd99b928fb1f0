# Debian's cross compiler, g++-aarch64-linux-gnu, with libssl-dev:arm64 and zlib1g-dev:arm64: installed beside those of
# this machine, or unpacked in a folder that -DCMAKE_FIND_ROOT_PATH names.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
if(CMAKE_FIND_ROOT_PATH)
  set(CMAKE_CXX_STANDARD_INCLUDE_DIRECTORIES "${CMAKE_FIND_ROOT_PATH}/usr/include/aarch64-linux-gnu")
endif()
