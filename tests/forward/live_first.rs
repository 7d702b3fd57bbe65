//! `forward.live_first`: new events go ahead of a backlog.

use super::*;

/// Received so long ago, it is a backlog.
const OLD_MS: u64 = 60_000;

impl Setup {
    /// A topic `click`, a backlog of `backlog` events that its time window holds back, and new events that are not held.
    fn with_backlog(backlog: std::ops::Range<u64>) -> Setup {
        let mut setup = Setup::new();
        setup.config.live_first = true;
        setup.config.in_flight_bytes_max = ByteSize::mib(1);
        setup.config.pace.windows = vec![closed_window()];
        setup.topic("click", 4);
        setup.send_all("click", now_ms() - OLD_MS, backlog);
        setup
    }

    /// Sends events of ten devices, each with its number.
    fn send_all(&self, topic: &str, received_at_ms: u64, numbers: std::ops::Range<u64>) {
        for at in numbers {
            let event = (topic, [number(at), vec![7; 1000]].concat());
            self.send_received_at(received_at_ms, &format!("device-{}", at % 10), &[event]);
        }
    }

    fn open_window(&mut self, forwarder: &Forwarder) {
        self.config.pace.windows.clear();
        forwarder.reload(&self.config);
    }

    /// Without a pace everything arrives, `events` in all, once and in order on each side: those from `live` on went ahead.
    fn assert_drains_without_a_pace(&mut self, forwarder: &Forwarder, live: u64, events: u64) {
        self.config.pace.events_per_second_max = 0;
        forwarder.reload(&self.config);
        let [backlog, ahead] = by_device(self.consume("click", 4, events as usize), live);
        assert_in_order(&backlog, 0..live);
        assert_in_order(&ahead, live..events);
        self.wait_for_empty_log(forwarder);
        self.assert_books_balance(events);
    }

    /// A log of 48 MiB that drops its oldest events when it is full.
    fn with_small_log() -> Setup {
        let mut setup = Setup::with_log(|wal| {
            (wal.bytes_max, wal.when_full) = (ByteSize::mib(48), WhenFull::DropOldest);
        });
        setup.config.live_first = true;
        setup.topic("click", 4);
        setup
    }

    /// Sends events of 100 kB of one device, each with its number.
    fn send_large(&self, received_at_ms: u64, numbers: std::ops::Range<u64>) {
        for at in numbers {
            self.send_received_at(received_at_ms, "a", &[("click", [number(at), vec![7; 100_000]].concat())]);
        }
    }

    pub(super) fn delivered(&self) -> u64 {
        self.metric("ringtail_forward_delivered_events_total")
    }

    /// Reads `topic` until so many different numbers have arrived: in the order in which each was the first.
    fn first_arrivals(&self, topic: &str, partitions: i32, count: usize) -> Vec<u64> {
        let (consumer, mut numbers) = (self.consumer(topic, partitions), Vec::new());
        wait_until("everything arrives", || {
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(50)) {
                let number = u64::from_be_bytes(message.payload().unwrap()[..8].try_into().unwrap());
                if !numbers.contains(&number) {
                    numbers.push(number);
                }
            }
            numbers.len() >= count
        });
        numbers
    }
}

fn wait_for_live(forwarder: &Forwarder) {
    wait_until("new events go ahead", || forwarder.status().live_first);
}

/// The numbers that arrived, by device; those from `live` on apart.
fn by_device(records: Vec<(Option<String>, Vec<u8>)>, live: u64) -> [HashMap<String, Vec<u64>>; 2] {
    let (ahead, backlog) = by_key(records)
        .into_iter()
        .map(|(key, numbers)| {
            let (ahead, backlog): (Vec<_>, Vec<_>) = numbers.into_iter().partition(|number| *number >= live);
            ((key.clone(), ahead), (key, backlog))
        })
        .unzip();
    [backlog, ahead]
}

/// Each device's numbers are those of `numbers`, once and in order.
fn assert_in_order(arrived: &HashMap<String, Vec<u64>>, numbers: std::ops::Range<u64>) {
    for device in 0..10 {
        let expected: Vec<u64> = numbers.clone().filter(|number| number % 10 == device).collect();
        let arrived = arrived.get(&format!("device-{device}")).cloned().unwrap_or_default();
        assert_eq!(arrived, expected, "device {device}");
    }
}

#[test]
fn new_events_go_ahead_of_a_backlog_and_all_arrive_once_in_order_each() {
    let mut setup = Setup::with_backlog(0..500);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    setup.send_all("click", now_ms(), 500..800);
    wait_until("the new events are delivered", || setup.delivered() == 300);
    let status = setup.wal.status();
    assert_eq!((status.pending_events, status.cursor_sequence), (500, 1));
    let ahead = status.delivered_ahead.unwrap();
    assert_eq!((ahead.first_sequence, ahead.end_sequence, ahead.events), (501, 801, 300));
    let age_ms = now_ms() - status.oldest_pending_received_at_ms.unwrap();
    assert!(age_ms >= OLD_MS, "{age_ms}");
    let [backlog, live] = by_device(setup.consume("click", 4, 300), 500);
    assert_in_order(&backlog, 0..0);
    assert_in_order(&live, 500..800);

    setup.open_window(&forwarder);
    // They may go on while the backlog drains, or be the next in order.
    setup.send_all("click", now_ms(), 800..900);
    setup.wait_for_empty_log(&forwarder);
    wait_until("it is over", || !forwarder.status().live_first);
    let [backlog, live] = by_device(setup.consume("click", 4, 900), 500);
    assert_in_order(&backlog, 0..500);
    assert_in_order(&live, 500..900);
    setup.assert_books_balance(900);
    assert_eq!(setup.wal.status().delivered_ahead, None);

    setup.send_all("click", now_ms(), 900..1000);
    let [_, live] = by_device(setup.consume("click", 4, 1000), 500);
    assert_in_order(&live, 500..1000);
    forwarder.stop(DEADLINE);
}

#[test]
fn without_it_everything_waits_and_goes_in_order() {
    let mut setup = Setup::with_backlog(0..200);
    setup.config.live_first = false;
    setup.config.pace.windows.clear();
    // Twenty at once, and then there is a backlog for nine seconds.
    setup.config.pace.events_per_second_max = 20;
    let forwarder = setup.start();
    wait_until("new events would go ahead by now", || setup.delivered() >= 100);
    setup.send_all("click", now_ms(), 200..230);
    wait_until("more is delivered", || setup.delivered() >= 110);
    setup.config.pace.events_per_second_max = 0;
    forwarder.reload(&setup.config);
    assert_in_order(&by_key(setup.consume("click", 4, 230)), 0..230);
    assert!(!forwarder.status().live_first);
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(230);
}

#[test]
fn a_pace_holds_the_backlog_and_no_new_event() {
    let mut setup = Setup::with_backlog(0..200);
    setup.config.pace.windows.clear();
    setup.config.pace.events_per_second_max = 20;
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    let before = setup.delivered();
    setup.send_all("click", now_ms(), 200..300);
    wait_until("the new events are delivered", || {
        setup.wal.status().delivered_ahead.is_some_and(|it| it.events == 100)
    });
    assert!(setup.wal.status().pending_events > 100, "{before} events of the backlog had gone by then");
    setup.assert_drains_without_a_pace(&forwarder, 200, 300);
}

#[test]
fn new_events_that_use_all_of_the_pace_leave_a_part_to_the_backlog() {
    let mut setup = Setup::with_backlog(0..200);
    setup.config.pace.windows.clear();
    setup.config.pace.events_per_second_max = 50;
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    let (begun, mut next) = (Instant::now(), 200);
    let backlog = || setup.delivered() - setup.wal.status().delivered_ahead.map_or(0, |ahead| ahead.events);
    let before = backlog();
    wait_until("some of the backlog is delivered", || {
        setup.send_all("click", now_ms(), next..next + 20);
        next += 20;
        backlog() >= before + 20
    });
    assert!(next - 200 > 50 * begun.elapsed().as_secs(), "they use all of it: {} in {:?}", next - 200, begun.elapsed());
    setup.assert_drains_without_a_pace(&forwarder, 200, next);
}

#[test]
fn new_events_do_not_wait_for_a_window_without_a_backlog_either() {
    let setup = Setup::with_backlog(0..0);
    let forwarder = setup.start();
    wait_until("kafka is there", || forwarder.status().connected);
    setup.send_all("click", now_ms(), 0..50);
    let numbers = by_key(setup.consume("click", 4, 50));
    assert_in_order(&numbers, 0..50);
    setup.wait_for_empty_log(&forwarder);
    assert!(!forwarder.status().live_first, "in order, where there is no backlog");
}

#[test]
fn a_restart_goes_on_where_both_were() {
    let setup = Setup::with_backlog(0..200);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    setup.send_all("click", now_ms(), 200..260);
    wait_until("the new events are delivered", || setup.delivered() == 60);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    let mut setup = setup_after_restart_delivers(setup, 200, 260..300, 40);
    // Off: the backlog, and then what was not delivered ahead.
    setup.config.live_first = false;
    setup.send_all("click", now_ms(), 300..320);
    let forwarder = setup.start();
    wait_until("kafka is there", || forwarder.status().connected);
    assert_eq!((setup.delivered(), setup.wal.status().pending_events), (0, 220));
    setup.open_window(&forwarder);
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.delivered(), 220);
    let [backlog, live] = by_device(setup.consume("click", 4, 320), 200);
    assert_in_order(&backlog, 0..200);
    assert_in_order(&live, 200..320);
    forwarder.stop(DEADLINE);
}

/// Starts again with `pending` events of a backlog, sends `numbers`, and waits until just they are delivered.
fn setup_after_restart_delivers(setup: Setup, pending: u64, numbers: std::ops::Range<u64>, delivered: u64) -> Setup {
    let setup = setup.reopened(|_| {});
    assert_eq!(setup.wal.status().pending_events, pending);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    setup.send_all("click", now_ms(), numbers);
    wait_until("the new events are delivered", || setup.delivered() == delivered);
    assert_eq!(setup.wal.status().pending_events, pending);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    setup.reopened(|_| {})
}

#[test]
fn a_broken_producer_takes_both_back() {
    let mut setup = Setup::with_backlog(0..300);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    setup.send_all("click", now_ms(), 300..400);
    wait_until("the new events are delivered", || setup.delivered() == 100);
    let broken = |setup: &Setup| setup.metric("ringtail_forward_delivery_failures_total{reason=\"producer_fatal\"}");
    // The first request of a producer that is refused so breaks it.
    let error = Code::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER;
    setup.cluster.request_errors(RDKafkaApiKey::Produce, &[error; 4]);
    setup.send_all("click", now_ms(), 400..500);
    wait_until("the producer is broken", || broken(&setup) > 0);
    wait_until("the new events are delivered", || setup.delivered() == 200);
    assert_eq!(setup.wal.status().pending_events, 300);
    setup.cluster.request_errors(RDKafkaApiKey::Produce, &[error; 4]);
    let before = broken(&setup);
    setup.open_window(&forwarder);
    setup.send_all("click", now_ms(), 500..600);
    setup.wait_for_empty_log(&forwarder);
    assert!(broken(&setup) > before);
    setup.assert_books_balance(600);
    // What was in flight may have arrived more than once.
    let mut numbers = setup.first_arrivals("click", 4, 600);
    numbers.sort_unstable();
    assert_eq!(numbers, (0..600).collect::<Vec<_>>());
}

#[test]
fn an_outage_makes_a_backlog_that_new_events_pass() {
    let mut setup = Setup::with_backlog(0..0);
    setup.config.pace.windows.clear();
    // What comes in order first, at this pace, would take a minute.
    setup.config.pace.events_per_second_max = 10;
    let forwarder = setup.start();
    setup.send_all("click", now_ms(), 0..1);
    setup.wait_for_empty_log(&forwarder);
    turns::take_down(&setup.cluster, 1);
    wait_until("the broker is missed", || !forwarder.status().connected);
    // More than may be in flight, by far.
    setup.send_all("click", now_ms() - OLD_MS, 1..2000);
    assert!(!forwarder.status().live_first, "not before there is a connection");
    setup.cluster.broker_up(1).unwrap();
    wait_for_live(&forwarder);
    setup.send_all("click", now_ms(), 2000..2010);
    wait_until("the new events are delivered", || setup.wal.status().delivered_ahead.is_some_and(|it| it.events == 10));
    assert!(setup.wal.status().pending_events > 1000);
    setup.assert_drains_without_a_pace(&forwarder, 2000, 2010);
}

#[test]
fn a_topic_that_is_held_keeps_neither_side_from_going_on() {
    let setup = Setup::with_backlog(0..0);
    setup.topic("open", 1);
    setup.closed_topic("closed");
    // Several times what may be in flight, of each side.
    let send = |received_at_ms, numbers: std::ops::Range<u64>| {
        for at in numbers {
            let closed = ("closed", [number(at), vec![7; 10_000]].concat());
            setup.send_received_at(received_at_ms, "a", &[closed, ("open", number(at))]);
        }
    };
    send(now_ms() - OLD_MS, 0..200);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    send(now_ms(), 200..400);
    assert_eq!(by_key(setup.consume("open", 1, 200))["a"], (200..400).collect::<Vec<_>>());
    // Those of the backlog are in the log still, these are in the spill alone.
    let is_passed = || setup.wal.status().delivered_ahead.is_some_and(|ahead| ahead.events > 100);
    wait_until("new events are out of the way", is_passed);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    assert_eq!(setup.delivered() + setup.wal.status().pending_events, 800);
    let mut setup = setup.reopened(|_| {});
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    setup.config.pace.windows.clear();
    forwarder.reload(&setup.config);
    // What came behind a held event, and was not passed, is sent again.
    let numbers = setup.first_arrivals("open", 1, 400);
    assert_eq!(numbers[200..], (0..200).collect::<Vec<_>>(), "the backlog is not held up");
    wait_until("all others are delivered", || {
        let status = forwarder.status();
        assert!(status.in_flight_bytes <= (1 << 20) + 20_000);
        status.spilled_events + status.in_flight_events == 400 && status.spilled_events >= 200
    });
    forwarder.stop(DEADLINE);
    drop(forwarder);

    let setup = setup.reopened(|_| {});
    setup.open_topic("closed");
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    let numbers = by_key(setup.consume("closed", 1, 400)).remove("a").unwrap();
    let [backlog, live] =
        [false, true].map(|live| numbers.iter().copied().filter(|number| (*number >= 200) == live).collect::<Vec<_>>());
    assert_eq!(backlog, (0..200).collect::<Vec<_>>());
    assert_eq!(live, (200..400).collect::<Vec<_>>());
    forwarder.stop(DEADLINE);
}

#[test]
fn a_full_log_drops_its_backlog_and_not_what_is_new() {
    let mut setup = Setup::with_small_log();
    setup.config.pace.events_per_second_max = 1;
    setup.send_large(now_ms() - OLD_MS, 0..200);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    // Twice what the log has room for.
    for batch in 0..50 {
        setup.send_large(now_ms(), 200 + batch * 20..220 + batch * 20);
        let events = (batch + 1) * 20;
        let is_ahead = || setup.wal.status().delivered_ahead.is_none_or(|ahead| ahead.events >= events);
        wait_until("the new events are delivered", is_ahead);
    }
    setup.config.pace.events_per_second_max = 0;
    forwarder.reload(&setup.config);
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.delivered() + setup.metric("ringtail_forward_dropped_events_total"), 1200);
    assert!(setup.delivered() >= 1000, "{} of 1000 new events", setup.delivered());
}

#[test]
fn a_full_log_drops_its_backlog_also_when_new_events_take_all_the_room() {
    let mut setup = Setup::with_small_log();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.config.pace.windows = vec![closed_window()];
    setup.send_large(now_ms() - OLD_MS, 0..200);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    turns::take_down(&setup.cluster, 1);
    wait_until("the broker is missed", || !forwarder.status().connected);
    setup.send_large(now_ms(), 200..220);
    // One topic may have a quarter.
    wait_until("there is no more room", || forwarder.status().in_flight_bytes >= 1 << 18);
    // Twice what fits. No commit is refused, `send_large` checks that.
    setup.send_large(now_ms(), 220..1000);
    setup.cluster.broker_up(1).unwrap();
    setup.config.pace.windows.clear();
    forwarder.reload(&setup.config);
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.delivered() + setup.metric("ringtail_forward_dropped_events_total"), 1000);
    forwarder.stop(DEADLINE);
}

#[test]
fn a_backlog_that_cannot_be_read_does_not_hold_up_what_is_new() {
    let mut setup = Setup::new();
    setup.config.live_first = true;
    setup.config.pace.windows = vec![closed_window()];
    setup.topic("click", 4);
    setup.send_large(now_ms() - OLD_MS, 0..200);
    let mut setup = setup.reopened(|_| {});
    let (retry_delay_min, retry_delay_max) = (setup.config.retry_delay_min, setup.config.retry_delay_max);
    (setup.config.retry_delay_min, setup.config.retry_delay_max) = (DEADLINE * 4, DEADLINE * 4);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    let broken = BrokenSegment::new(&setup, 2);
    setup.open_window(&forwarder);
    wait_until("it cannot be read", || forwarder.status().last_error.is_some());
    setup.send_all("click", now_ms(), 200..210);
    wait_until("the new events are delivered", || setup.wal.status().delivered_ahead.is_some_and(|it| it.events == 10));
    forwarder.stop(DEADLINE);
    drop((forwarder, broken));
    (setup.config.retry_delay_min, setup.config.retry_delay_max) = (retry_delay_min, retry_delay_max);
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.delivered(), 210);
    forwarder.stop(DEADLINE);
}

#[test]
fn it_is_refused_together_with_transactions() {
    let mut setup = exactly_once();
    setup.config.live_first = true;
    let result = Forwarder::start(&setup.config, BATCH_BYTES_MAX, setup.wal.clone(), setup.metrics.clone());
    let error = result.map(drop).unwrap_err();
    let text = std::error::Error::source(&error).unwrap().to_string();
    assert!(text.contains("forward.live_first") && text.contains("exactly_once"), "{text}");
}

#[test]
fn transactions_go_on_behind_what_was_delivered_ahead() {
    let setup = Setup::with_backlog(0..100);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    setup.send_all("click", now_ms(), 100..150);
    wait_until("the new events are delivered", || setup.delivered() == 50);
    // Parked, and not shown again: it must not be taken back.
    setup.send("a", &[("no topic", number(150))]);
    wait_until("it is parked", || setup.metric("ringtail_forward_parked_events_total") == 1);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    let mut setup = setup.reopened(|_| {});
    (setup.config.live_first, setup.config.delivery) = (false, Delivery::ExactlyOnce);
    setup.config.commit_interval = Duration::from_millis(50);
    setup.config.pace.windows.clear();
    setup.topic("ringtail-cursors", 1);
    setup.send_all("click", now_ms(), 200..220);
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.delivered(), 120);
    assert_eq!(forwarder.parked().count(), 1);
    let [backlog, live] = by_device(setup.consume("click", 4, 170), 100);
    assert_in_order(&backlog, 0..100);
    let expected: usize = live.values().map(Vec::len).sum();
    assert_eq!(expected, 70);
    forwarder.stop(DEADLINE);
}

#[test]
fn the_tools_know_what_was_delivered_ahead() {
    let mut setup = Setup::with_backlog(0..20);
    setup.config.in_flight_bytes_max = ByteSize::mib(8);
    let forwarder = setup.start();
    wait_for_live(&forwarder);
    for at in 20..320 {
        setup.send("device", &[("click", [number(at), vec![7; 100_000]].concat())]);
    }
    wait_until("the new events are delivered", || setup.delivered() == 300);
    // The segments in between go, those of the backlog and the newest stay.
    wait_until("what was delivered ahead is removed", || setup.wal.status().segments <= 4);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    setup.send_all("click", now_ms(), 320..330);
    setup.wal.close();
    let Setup { wal, _directory: directory, .. } = setup;
    drop(wal);
    let ringtail = |arguments: &[&str]| {
        let (printed, said) = backlog(directory.path(), arguments);
        assert!(!said.contains("missing"), "{arguments:?}: {said}");
        printed
    };
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let sequences = |text: &str| text.lines().map(|line| json(line)["sequence"].as_u64().unwrap()).collect::<Vec<_>>();
    let expected: Vec<u64> = (1..=20).chain(321..=330).collect();
    let check = json(&ringtail(&["check", "--json"]));
    assert_eq!((&check["missing"], &check["problems"]), (&serde_json::json!([]), &serde_json::json!([])), "{check}");
    assert_eq!(sequences(&ringtail(&["export"])), expected);
    assert_eq!(sequences(&ringtail(&["peek", "--json", "--limit", "100"])), expected);
    let status = json(&ringtail(&["status", "--json"]));
    assert_eq!(
        (&status["pending_events"], &status["delivered_ahead"]["events"]),
        (&30.into(), &300.into()),
        "{status}"
    );
    assert!(ringtail(&["status"]).contains("300 events delivered ahead of it"));
}
