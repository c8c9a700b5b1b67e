"""The driver's errors as ours, and owned resources: closed twice, used late, released in order."""

from __future__ import annotations

import subprocess
import sys
from ctypes.util import find_library

import numpy as np
import pytest
from cuda.bindings import driver as real
from helpers_cuda.simulator import Code, SimulatedDriver

from ddpm_runtime.cuda import GraphError, OutOfDeviceMemoryError, open_device
from ddpm_runtime.cuda.driver import _REMEDIES, Driver, load_driver
from ddpm_runtime.errors import BackendError, BackendUnavailableError, LifecycleError


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        (Code.CUDA_ERROR_OUT_OF_MEMORY, OutOfDeviceMemoryError, "smaller batch size"),
        (Code.CUDA_ERROR_NO_DEVICE, BackendUnavailableError, "CUDA_VISIBLE_DEVICES"),
        (Code.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, BackendUnavailableError, "restart the machine"),
        (Code.CUDA_ERROR_STUB_LIBRARY, BackendUnavailableError, "LD_LIBRARY_PATH"),
        (Code.CUDA_ERROR_NO_BINARY_FOR_GPU, BackendError, "ddpm_runtime.cuda.build_kernels"),
        (Code.CUDA_ERROR_INVALID_IMAGE, BackendError, "ddpm_runtime.cuda.build_kernels"),
        (Code.CUDA_ERROR_ILLEGAL_ADDRESS, BackendError, "compute-sanitizer"),
        (Code.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, GraphError, "level L0"),
        (Code.CUDA_ERROR_INVALID_VALUE, BackendError, "simulated"),
    ],
)
def test_every_error_has_its_name_its_call_and_a_remedy(code, kind, remedy):
    driver = SimulatedDriver()
    driver.fail("cuStreamSynchronize", code)
    with open_device(driver=driver.started()) as device:
        stream = device.stream()
        with pytest.raises(kind, match=rf"cuStreamSynchronize answered {code.name}.*{remedy}"):
            stream.synchronize()


def test_the_message_says_what_was_asked():
    driver = SimulatedDriver(memory_bytes=1000)
    with open_device(driver=driver.started()) as device:
        with pytest.raises(
            OutOfDeviceMemoryError, match="cannot allocate 1,001 bytes on Simulated GPU"
        ):
            device.allocate(1001)
        with pytest.raises(BackendError, match=r"Simulated GPU \(compute capability 9\.0\)"):
            device.load(b"not code")


def test_a_driver_that_is_too_old_is_refused_with_both_versions():
    with pytest.raises(
        BackendUnavailableError, match=r"supports CUDA 12\.4; 13\.0 is needed.*release 580"
    ):
        SimulatedDriver(version=12040).started()


def test_a_driver_without_a_function_is_refused_by_name():
    class Old:
        def cuInit(self, flags):
            raise RuntimeError('Function "cuInit" not found')

    with pytest.raises(BackendUnavailableError, match=r"does not offer cuInit.*release 580"):
        Driver(Old()).call("cuInit", 0)


@pytest.mark.parametrize(("devices", "ordinal"), [(0, 0), (2, 2), (1, -1)])
def test_a_device_that_is_not_there_is_refused_with_the_count(devices, ordinal):
    driver = SimulatedDriver(devices=devices)
    with pytest.raises(
        BackendUnavailableError, match=rf"device {ordinal} was asked.* sees {devices} GPU"
    ):
        open_device(ordinal, driver=driver.started())


@pytest.mark.skipif(bool(find_library("cuda")), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_driver_is_told_so():
    with pytest.raises(BackendUnavailableError, match=r"does not offer cuInit: .*release 580"):
        load_driver()


def test_every_remedy_is_for_an_error_the_driver_has():
    assert [name for name in _REMEDIES if not hasattr(Code, name)] == []


def test_missing_bindings_have_the_pip_line():
    code = """
import sys
sys.modules["cuda"] = sys.modules["cuda.bindings"] = None
import ddpm_runtime.cuda
from ddpm_runtime.errors import BackendUnavailableError
try:
    ddpm_runtime.cuda.open_device()
except BackendUnavailableError as error:
    print(error)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert "pip install 'ddpm-engine[cuda]'" in answer.stdout, answer.stderr


def test_importing_the_package_loads_no_bindings():
    code = "import sys, ddpm_runtime.cuda; print([m for m in sys.modules if m.startswith('cuda')])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.strip() == "[]", answer.stderr


def test_resources_are_closed_once_and_refuse_to_be_used_afterwards():
    driver = SimulatedDriver()
    with open_device(driver=driver.started()) as device:
        made = {
            "DeviceMemory": (device.allocate(64), "cuMemFree", lambda r: r.address),
            "PinnedMemory": (
                device.allocate_pinned(64),
                "cuMemFreeHost",
                lambda r: r.array("u1", (64,)),
            ),
            "Stream": (device.stream(), "cuStreamDestroy", lambda r: r.synchronize()),
            "Event": (device.event(), "cuEventDestroy", lambda r: r.synchronize()),
        }
        for name, (resource, release, use) in made.items():
            use(resource) if name != "Event" else None
            resource.close()
            resource.close()
            assert driver.log.count(release) == 1
            with pytest.raises(LifecycleError, match=f"this {name} is closed"):
                use(resource)
    assert driver.log[-1] == "cuDevicePrimaryCtxRelease"


def test_a_device_releases_what_is_open_last_first_then_itself():
    driver = SimulatedDriver()
    device = open_device(driver=driver.started())
    device.allocate(8)
    device.stream()
    device.event()
    device.allocate_pinned(8)
    driver.log.clear()
    device.close()
    device.close()
    assert driver.log == [
        *("cuCtxSetCurrent", "cuMemFreeHost", "cuEventDestroy", "cuStreamDestroy", "cuMemFree"),
        "cuDevicePrimaryCtxRelease",
    ]
    assert driver.retained == 0
    assert not driver.memory
    with pytest.raises(LifecycleError, match=r"open it again with open_device\(\)"):
        device.make_current()


def test_copies_and_fills_arrive_in_stream_order():
    driver = SimulatedDriver()
    with open_device(driver=driver.started()) as device:
        memory, stream = device.allocate(32), device.stream()
        pinned = device.allocate_pinned(32).array(np.uint32, (8,))
        stream.fill(memory.address, 0xFF, 32)
        stream.fill_words(memory.address, 7, 3)
        pinned[:] = 9
        stream.copy_to_device(memory.address + 12, pinned[:1])
        stream.copy_to_host(pinned, memory.address)
        stream.synchronize()
        assert pinned.tolist() == [7, 7, 7, 9, *[0xFFFFFFFF] * 4]


def test_waiting_for_an_event_waits_for_nothing_behind_it():
    driver = SimulatedDriver()
    ran = []
    with open_device(driver=driver.started()) as device:
        one, other, event = device.stream(), device.stream(), device.event()
        driver.host_function(one.address, lambda: ran.append("before"))
        one.record(event)
        driver.host_function(one.address, lambda: ran.append("behind"))
        other.wait(event)
        driver.host_function(other.address, lambda: ran.append("after"))
        other.synchronize()
        assert ran == ["before", "after"]


def test_the_simulator_answers_only_what_the_real_bindings_have():
    offered = [name for name in dir(SimulatedDriver) if name.startswith("_cu")]
    assert len(offered) > 35
    assert [name for name in offered if not hasattr(real, name[1:])] == []
