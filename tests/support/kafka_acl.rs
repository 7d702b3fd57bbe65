//! Rules of who may do what with a topic, and passwords of SCRAM users: the `rdkafka` crate has no calls for them, librdkafka
//! has.

use std::ffi::{CStr, CString, c_char};
use std::ptr;

use rdkafka::admin::AdminClient;
use rdkafka::bindings::*;
use rdkafka::client::DefaultClientContext;

/// Longest that the broker may take for one order.
const PATIENCE_MS: i32 = 30_000;

/// A rule about one topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acl {
    AllowAll,
    DenyWrite,
}

/// Adds a rule.
pub fn create(admin: &AdminClient<DefaultClientContext>, topic: &str, principal: &str, rule: Acl) {
    use rd_kafka_AclOperation_t as Operation;
    use rd_kafka_AclPermissionType_t as Permission;
    let (operation, permission) = match rule {
        Acl::AllowAll => (Operation::RD_KAFKA_ACL_OPERATION_ALL, Permission::RD_KAFKA_ACL_PERMISSION_TYPE_ALLOW),
        Acl::DenyWrite => (Operation::RD_KAFKA_ACL_OPERATION_WRITE, Permission::RD_KAFKA_ACL_PERMISSION_TYPE_DENY),
    };
    let (topic, principal, host) = (text(topic), text(principal), text("*"));
    let mut error = [0 as c_char; 512];
    // SAFETY: the strings and the buffer outlive the call, which copies them.
    let binding = unsafe {
        rd_kafka_AclBinding_new(
            rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC,
            topic.as_ptr(),
            rd_kafka_ResourcePatternType_t::RD_KAFKA_RESOURCE_PATTERN_LITERAL,
            principal.as_ptr(),
            host.as_ptr(),
            operation,
            permission,
            error.as_mut_ptr(),
            error.len(),
        )
    };
    assert!(!binding.is_null(), "{:?}", said(error.as_ptr()));
    ask(admin, rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_CREATEACLS, |client, options, queue| {
        let mut bindings = [binding];
        // SAFETY: all of them are live; the binding is freed after librdkafka has copied it.
        unsafe {
            rd_kafka_CreateAcls(client, bindings.as_mut_ptr(), 1, options, queue);
            rd_kafka_AclBinding_destroy(binding);
        }
    });
}

/// Removes every rule about a topic.
pub fn delete(admin: &AdminClient<DefaultClientContext>, topic: &str) {
    let topic = text(topic);
    let mut error = [0 as c_char; 512];
    // SAFETY: the string and the buffer outlive the call, which copies them; null stands for any.
    let filter = unsafe {
        rd_kafka_AclBindingFilter_new(
            rd_kafka_ResourceType_t::RD_KAFKA_RESOURCE_TOPIC,
            topic.as_ptr(),
            rd_kafka_ResourcePatternType_t::RD_KAFKA_RESOURCE_PATTERN_LITERAL,
            ptr::null(),
            ptr::null(),
            rd_kafka_AclOperation_t::RD_KAFKA_ACL_OPERATION_ANY,
            rd_kafka_AclPermissionType_t::RD_KAFKA_ACL_PERMISSION_TYPE_ANY,
            error.as_mut_ptr(),
            error.len(),
        )
    };
    assert!(!filter.is_null(), "{:?}", said(error.as_ptr()));
    ask(admin, rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DELETEACLS, |client, options, queue| {
        let mut filters = [filter];
        // SAFETY: all of them are live; the filter is freed after librdkafka has copied it.
        unsafe {
            rd_kafka_DeleteAcls(client, filters.as_mut_ptr(), 1, options, queue);
            rd_kafka_AclBinding_destroy(filter);
        }
    });
}

/// Gives a SCRAM-SHA-256 user another password. Needs a librdkafka with TLS.
pub fn set_scram_password(admin: &AdminClient<DefaultClientContext>, user: &str, password: &str) {
    let user = text(user);
    // SAFETY: strings and bytes outlive the call, which copies them; without a salt one is made.
    let change = unsafe {
        rd_kafka_UserScramCredentialUpsertion_new(
            user.as_ptr(),
            rd_kafka_ScramMechanism_t::RD_KAFKA_SCRAM_MECHANISM_SHA_256,
            4096,
            password.as_ptr(),
            password.len(),
            ptr::null(),
            0,
        )
    };
    ask(admin, rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_ALTERUSERSCRAMCREDENTIALS, |client, options, queue| {
        let mut changes = [change];
        // SAFETY: all of them are live; the change is freed after librdkafka has copied it.
        unsafe {
            rd_kafka_AlterUserScramCredentials(client, changes.as_mut_ptr(), 1, options, queue);
            rd_kafka_UserScramCredentialAlteration_destroy(change);
        }
    });
}

/// Sends one order and waits for the answer.
fn ask(
    admin: &AdminClient<DefaultClientContext>,
    operation: rd_kafka_admin_op_t,
    order: impl FnOnce(*mut rd_kafka_t, *const rd_kafka_AdminOptions_t, *mut rd_kafka_queue_t),
) {
    let client = admin.inner().native_ptr();
    // SAFETY: the client is live; options, queue and event are freed once, after their last use.
    unsafe {
        let options = rd_kafka_AdminOptions_new(client, operation);
        let queue = rd_kafka_queue_new(client);
        order(client, options, queue);
        let event = rd_kafka_queue_poll(queue, PATIENCE_MS);
        assert!(!event.is_null(), "the broker does not answer");
        let message = said(rd_kafka_event_error_string(event));
        assert_eq!(rd_kafka_event_error(event), rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR, "{message}");
        rd_kafka_event_destroy(event);
        rd_kafka_queue_destroy(queue);
        rd_kafka_AdminOptions_destroy(options);
    }
}

fn text(text: &str) -> CString {
    CString::new(text).expect("it has no NUL")
}

fn said(message: *const c_char) -> String {
    // SAFETY: librdkafka's messages are strings that end with a NUL.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}
