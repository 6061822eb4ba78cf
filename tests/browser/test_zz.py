import pytest
from tests.browser.places import in_jupyterlab, CELLS
from tests.browser.conftest import shoot
from playwright.sync_api import expect
@pytest.mark.timeout(400)
def test_it(browser, lab):
    with in_jupyterlab(browser, lab) as place:
        page, view = place.page, place.view
        page.on("console", lambda m: print("CONSOLE", m.type, m.text[:300]))
        view.button("Details of servers[1]").click()
        s = view.slider("Latency of servers[1]")
        s.focus()
        for i in range(3):
            page.keyboard.press("ArrowRight")
            print("ACTIVE", page.evaluate("document.activeElement.outerHTML.slice(0,200)"), s.get_attribute("aria-valuetext"), view.status.text_content())
        page.wait_for_timeout(1000)
        print(s.get_attribute("aria-valuetext"), view.status.text_content(), s.evaluate("e=>e.outerHTML"))
        page.wait_for_timeout(3000)
        print(s.get_attribute("aria-valuetext"), view.status.text_content())
        print("LOAD", open("/proc/loadavg").read())
        try:
            place.reload()
            view.expect_first_frame()
            print("RELOADED FINE")
        except AssertionError:
            print("FIRST RELOAD FAILED", open("/proc/loadavg").read())
            place.reload()
            try:
                view.expect_first_frame(); print("SECOND RELOAD FINE")
            except AssertionError as e:
                print("SECOND FAILED")
