//! The books balance to the event, also when a producer is replaced while events of the spill are on their way.

use super::*;

impl Setup {
    /// Two brokers, so that one can be taken away.
    fn with_a_broker_for_each() -> Setup {
        let mut setup = Setup::with_brokers(2, |_| {});
        setup.config.in_flight_bytes_max = ByteSize::mib(1);
        setup.config.kafka_password_file = setup._directory.path().join("password");
        setup.set_password("first");
        setup
    }

    /// Makes `topic`, with a partition for each of `leaders`.
    fn topic_on(&self, topic: &str, leaders: &[i32]) {
        self.topic(topic, leaders.len() as i32);
        for (partition, leader) in leaders.iter().enumerate() {
            self.cluster.partition_leader(topic, partition as i32, Some(*leader)).unwrap();
        }
    }

    /// Kafka does not ask for it. When it changes, the producer is replaced.
    fn set_password(&self, password: &str) {
        std::fs::write(&self.config.kafka_password_file, password).unwrap();
    }

    /// Every committed event is delivered, parked, dropped or pending, also while much is under way.
    fn wait_for_balance(&self, committed: u64) {
        wait_until("the books balance", || {
            let counted = ["delivered", "parked", "dropped"]
                .map(|what| self.metric(&format!("ringtail_forward_{what}_events_total")));
            counted.iter().sum::<u64>() + self.wal.status().pending_events == committed
        });
    }

    /// A client whose events go to the first of two partitions of `topic`, and one whose events go to the second. Sends an event
    /// of each of ten.
    fn clients_of_two_partitions(&self, topic: &str) -> [String; 2] {
        (0..10).for_each(|at| self.send(&format!("device-{at}"), &[(topic, number(at))]));
        let (consumer, mut clients) = (self.consumer(topic, 2), [const { None }; 2]);
        wait_until("both have events", || {
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(50)) {
                let client = String::from_utf8(message.key().unwrap().to_vec()).unwrap();
                clients[message.partition() as usize] = Some(client);
            }
            clients.iter().all(Option::is_some)
        });
        clients.map(Option::unwrap)
    }
}

/// Larger than what is kept in memory of a topic that is held, all together.
fn large(at: u64) -> Vec<u8> {
    [number(at), vec![7; 10_000]].concat()
}

#[test]
fn what_a_partition_took_out_of_turn_is_counted_once() {
    let setup = Setup::with_a_broker_for_each();
    setup.topic_on("t", &[1, 2]);
    setup.topic_on("open", &[1]);
    let forwarder = setup.start();
    let [near, far] = setup.clients_of_two_partitions("t");
    setup.wait_for_empty_log(&forwarder);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    setup.close_topic("t");
    let forwarder = setup.start();
    for at in 0..200 {
        setup.send(if at % 2 == 0 { &near } else { &far }, &[("t", large(at)), ("open", number(at))]);
    }
    let is_spilled = || forwarder.status().spilled_events + forwarder.status().in_flight_events == 200;
    wait_until("the topic is out of the way", || forwarder.status().spilled_events > 100 && is_spilled());
    setup.wait_for_balance(410);

    // One partition takes what it gets, and events before that in the spill wait for the other one.
    turns::take_down(&setup.cluster, 2);
    setup.open_topic("t");
    let consumer = setup.consumer("t", 1);
    wait_until("the third arrives, the second cannot", || {
        let message = consumer.poll(Duration::from_millis(50)).and_then(Result::ok);
        message.is_some_and(|message| message.payload() == Some(&large(2)))
    });
    setup.wait_for_balance(410);
    setup.set_password("second");
    setup.cluster.broker_up(2).unwrap();
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(410);
    forwarder.stop(DEADLINE);
}

#[test]
fn what_the_log_shows_again_of_the_spill_is_counted_once() {
    let setup = Setup::with_a_broker_for_each();
    setup.topic_on("far", &[2]);
    setup.topic_on("open", &[1]);
    setup.topic_on("closed", &[1]);
    let forwarder = setup.start();
    setup.send("a", &[("far", number(0))]);
    setup.wait_for_empty_log(&forwarder);
    turns::take_down(&setup.cluster, 2);
    setup.close_topic("closed");
    // The watermark waits for this one. There is room for more, so that its topic is not held.
    setup.send("a", &[("far", number(1))]);
    for at in 0..90 {
        setup.send("a", &[("closed", large(at)), ("open", number(at))]);
    }
    wait_until("the topic is out of the way", || forwarder.status().spilled_events > 50);
    assert_eq!(setup.wal.status().cursor_sequence, 2);
    setup.open_topic("closed");
    assert_eq!(by_key(setup.consume("closed", 1, 90))["a"], (0..90).collect::<Vec<_>>());
    wait_until("the spill is empty", || forwarder.status().spilled_events == 0);
    setup.wait_for_balance(182);

    // The log shows all of them again.
    setup.set_password("second");
    setup.consume("closed", 1, 180);
    setup.wait_for_balance(182);
    setup.cluster.broker_up(2).unwrap();
    setup.wait_for_empty_log(&forwarder);
    setup.assert_books_balance(182);
    forwarder.stop(DEADLINE);
}

/// As after a kill between the two.
#[test]
fn what_was_parked_out_of_the_spill_before_that_was_noted_there_is_parked_once() {
    let mut setup = exactly_once();
    setup.config.in_flight_bytes_max = ByteSize::mib(1);
    setup.topic("open", 1);
    setup.closed_topic("closed");
    let forwarder = setup.start();
    // Two of each, that nothing but their place tells apart.
    for at in 0..20 {
        let closed = ("closed", number(at));
        setup.send("a", &[closed.clone(), closed, ("open", number(at))]);
    }
    wait_until("the topic is out of the way", || setup.delivered() == 20 && forwarder.status().spilled_events == 40);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    let (spill, kept) = (setup._directory.path().join("spill"), setup._directory.path().join("kept"));
    copy(&spill, &kept);

    setup.config.topic_grace = Duration::from_millis(100);
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    assert_eq!(setup.parked().len(), 40);

    let setup = setup.reopened_after(|directory| {
        std::fs::remove_dir_all(directory.join("spill")).unwrap();
        copy(&directory.join("kept"), &directory.join("spill"));
    });
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    assert_eq!(setup.parked().len(), 40);
    assert_eq!(setup.metric("ringtail_forward_parked_events_total"), 40, "all that were pending at the start");
    forwarder.stop(DEADLINE);
}

/// Parks the events 0, 1 and 2, and begins another log beside the store that they are in.
fn beside_parked(setup: Setup) -> Setup {
    let forwarder = setup.start();
    for at in 0..3 {
        setup.send("a", &[("not a topic", number(at))]);
    }
    setup.wait_for_empty_log(&forwarder);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    setup.reopened_after(|directory| {
        for entry in std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap()) {
            if entry.file_type().unwrap().is_dir() && entry.file_name() != "parked" {
                std::fs::remove_dir_all(entry.path()).unwrap();
            }
        }
    })
}

/// The next log counts from 1 again, and what it shows is not what was parked of the one before.
#[test]
fn what_an_earlier_log_has_parked_stays() {
    let setup = beside_parked(exactly_once());
    setup.topic("click", 1);
    for at in 0..3 {
        setup.send("a", &[("click", number(at)), ("not a topic", number(3 + at))]);
    }
    for _ in 0..2 {
        let forwarder = setup.start();
        setup.wait_for_empty_log(&forwarder);
        forwarder.stop(DEADLINE);
        let parked: Vec<Vec<u8>> = setup.parked().iter().map(|event| event.payload.to_vec()).collect();
        assert_eq!(parked, (0..6).map(number).collect::<Vec<_>>());
    }
}

/// Copies the files of a directory.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// An event that is requeued keeps the sequence that it had.
#[test]
fn what_an_earlier_log_has_parked_stays_also_when_it_was_requeued_and_parked_again() {
    let mut setup = beside_parked(exactly_once());
    setup.config.topic_grace = Duration::from_millis(100);
    setup.closed_topic("closed");
    setup.topic("click", 1);
    let forwarder = setup.start();
    let events: Vec<ParkedEvent> = forwarder.parked().events(0).map(Result::unwrap).collect();
    assert_eq!(events.len(), 3);
    wait_until("requeued", || forwarder.requeuer().requeue(&events, Some("closed")).is_ok());
    forwarder.parked().remove(&events.iter().map(|event| event.id).collect::<Vec<_>>()).unwrap();
    wait_until("parked again", || forwarder.status().parked_events == 3 && forwarder.status().spilled_events == 0);
    setup.wait_for_empty_log(&forwarder);
    forwarder.stop(DEADLINE);
    drop(forwarder);
    let setup = setup.reopened_after(|_| {});
    for at in 0..3 {
        setup.send("a", &[("click", number(at))]);
    }
    let forwarder = setup.start();
    setup.wait_for_empty_log(&forwarder);
    forwarder.stop(DEADLINE);
    assert_eq!(setup.parked().len(), 3, "parked events of an earlier log, requeued and parked again");
}

/// A topic of which one event is on its way to a leader that is away keeps the watermark where it is, while another topic fills
/// the spill: what is remembered of that is bounded.
#[test]
fn a_quiet_topic_that_stands_still_gets_out_of_the_way_of_what_is_spilled() {
    let mut setup = Setup::with_brokers(2, |_| {});
    setup.config.in_flight_bytes_max = ByteSize::mib(16);
    setup.topic_on("far", &[2]);
    setup.topic_on("open", &[1]);
    setup.topic_on("closed", &[1]);
    let forwarder = setup.start();
    setup.send("a", &[("far", number(0))]);
    setup.wait_for_empty_log(&forwarder);
    turns::take_down(&setup.cluster, 2);
    setup.close_topic("closed");
    setup.send("a", &[("far", number(1))]);
    for at in 0..300 {
        let mut events: Vec<(&str, Vec<u8>)> = (0..1000).map(|n| ("closed", number(at * 1000 + n))).collect();
        events.push(("open", number(at)));
        setup.send("a", &events);
    }
    wait_until("the watermark passes the quiet topic", || {
        assert!(forwarder.heartbeat_age() < Duration::from_secs(30));
        setup.wal.status().cursor_sequence > 3
    });
    assert_eq!(forwarder.status().held_topics, 2);
    forwarder.stop(Duration::from_secs(1));
}
